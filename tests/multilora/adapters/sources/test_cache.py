"""What is in the cache, whole and verified; what goes from it, and when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from multilora.adapters.sources.cache import SourceCache, content_of, default_root


def put(cache: SourceCache, source: str, text: str = "", version: str | None = None) -> str:
    with cache.temporary() as folder:
        (folder / "x").write_text(text or source)
        return cache.publish(folder, source, version)


def get(cache: SourceCache, content: str) -> str | None:
    with cache.opened(content) as folder:
        return None if folder is None else (folder / "x").read_text()


def names(cache: SourceCache) -> list[str]:
    return [note.source for note in cache.sources()]


def test_what_was_published_is_found_by_its_source(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path / "cache")
    assert cache.known("s") is None
    assert (cache.folders(), cache.sources()) == ([], [])
    content = put(cache, "s", version="1")
    known = SourceCache(tmp_path / "cache").known("s")
    assert known is not None
    assert (known.content, known.version) == (content, "1")
    assert get(cache, content) == "s"
    assert get(cache, "0" * 64) is None
    assert list((cache.root / "temporary").iterdir()) == []


def test_equal_content_is_kept_once(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    assert put(cache, "s", "same") == put(cache, "t", "same") != put(cache, "u")
    assert len(cache.folders()) == 2
    assert names(cache) == ["s", "t", "u"]


def test_another_content_takes_the_place_of_a_sources_last(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    old, new = put(cache, "s", "old"), put(cache, "s", "new")
    known = cache.known("s")
    assert known is not None
    assert known.content == new
    assert get(cache, old) == "old"  # until its room is needed


def test_what_is_not_what_it_was_is_removed(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    for damage in (
        lambda folder: (folder / "x").write_text("other"),
        lambda folder: (folder / "y").write_text("more"),
        lambda folder: (folder / "x").unlink(),
        lambda folder: (folder / "y").symlink_to("/etc/passwd"),
    ):
        content = put(cache, "s")
        damage(tmp_path / "contents" / content)
        assert get(cache, content) is None
        assert cache.known("s") is None
    assert get(cache, put(cache, "s")) == "s"


def test_notes_that_nothing_of_ours_has_written_are_none(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    put(cache, "s")
    (note,) = (tmp_path / "sources").iterdir()
    for text in ("", "[]", "{}", '{"source": "t"}', "\xff" * 9):
        note.write_text(text)
        assert cache.known("s") is None
        assert cache.sources() == []


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path, max_bytes=30)
    contents = [put(cache, name * 10) for name in "abc"]
    for age, content in enumerate(contents):
        os.utime(tmp_path / "contents" / content, (age, age))
    assert get(cache, contents[0]) == "a" * 10  # used
    put(cache, "d" * 10)
    assert names(cache) == ["a" * 10, "c" * 10, "d" * 10]
    assert cache.make_room(10) == 10
    assert names(cache) == ["d" * 10]


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path, max_bytes=10)
    content = put(cache, "a" * 10)
    with cache.opened(content) as folder:
        assert folder is not None
        put(cache, "b" * 10)
        assert (folder / "x").read_text() == "a" * 10
        assert cache.make_room(0) == 10
    assert cache.make_room(0) == 0
    assert get(cache, content) is None


def test_what_is_being_fetched_stays_and_what_was_left_by_the_dead_goes(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)
    put(cache, "s")
    dead = tmp_path / "temporary" / "dead"
    dead.mkdir()
    (dead / "x").write_text("half")
    with cache.temporary() as folder:
        cache.make_room(1 << 20)
        assert folder.is_dir()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = SourceCache(tmp_path)

    def fail() -> None:
        with cache.temporary() as folder:
            (folder / "x").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "temporary").iterdir()) == []


WORK = """
import sys, random
from pathlib import Path
from multilora.adapters.sources.cache import SourceCache
cache, rng = SourceCache(Path(sys.argv[1]), 4000), random.Random(int(sys.argv[2]))
good = 0
for _ in range(60):
    name = rng.choice("abcdefgh")
    known = cache.known(name)
    if known is None:
        with cache.temporary() as folder:
            (folder / "x").write_text(name * 1000)
            content = cache.publish(folder, name, None)
    else:
        content = known.content
    with cache.opened(content) as folder:
        if folder is not None:
            assert (folder / "x").read_text() == name * 1000
            assert (folder / "x").read_text() == name * 1000
            good += 1
print(good)
"""


@pytest.mark.seconds
def test_several_processes_share_it(tmp_path: Path) -> None:
    works = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for work in works:
        out, errors = work.communicate(timeout=60)
        assert (work.returncode, errors) == (0, "")
        assert int(out) > 30
    cache = SourceCache(tmp_path)
    assert cache.make_room(1 << 20) <= 4000 + 3 * 1000  # those in use
    for folder in cache.folders():
        assert content_of(tmp_path / "contents" / folder.content) == folder.content
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_user_has_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_root() == Path("/cache/multilora/adapters")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_root() == Path("/home/me/.cache/multilora/adapters")
