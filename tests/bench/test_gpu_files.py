"""Results and compiled kernels that one run of `bench/gpu.py` leaves to the next."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path

import gpu_files
import pytest


def compile_into(cache: Path, name: str, size: int = 10, age: int = 0) -> Path:
    """A compiled kernel as Triton 3.6 leaves it: files, and a list of them by their whole paths."""
    entry = cache / name
    entry.mkdir(parents=True)
    (entry / "k.cubin").write_bytes(random.Random(name).randbytes(size))
    (entry / "k.json").write_text("{}")
    files = {name: str(entry / name) for name in ("k.cubin", "k.json")}
    (entry / "__grp__k.json").write_text(json.dumps({"child_paths": files}))
    for path in entry.iterdir():
        os.utime(path, (1e9 - age, 1e9 - age))
    return entry


def test_kernels_come_back_at_another_place(tmp_path: Path) -> None:
    entry = compile_into(tmp_path / "a", "KERNEL1")
    assert gpu_files.pack(tmp_path / "a", tmp_path) == 0
    assert gpu_files.unpack(tmp_path, tmp_path / "b") == []
    there = tmp_path / "b" / "KERNEL1"
    assert (there / "k.cubin").read_bytes() == (entry / "k.cubin").read_bytes()
    files = json.loads((there / "__grp__k.json").read_text())["child_paths"]
    assert files == {name: str(there / name) for name in ("k.cubin", "k.json")}
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["KERNEL1"]


def test_what_is_in_the_cache_stays(tmp_path: Path) -> None:
    compile_into(tmp_path / "a", "KERNEL1", size=10)
    own = compile_into(tmp_path / "b", "KERNEL1", size=20)
    gpu_files.pack(tmp_path / "a", tmp_path)
    gpu_files.unpack(tmp_path, tmp_path / "b")
    assert (own / "k.cubin").stat().st_size == 20


def test_what_is_being_written_is_not_packed(tmp_path: Path) -> None:
    entry = compile_into(tmp_path / "a", "KERNEL1")
    (entry / "tmp.pid_7_x").mkdir()
    (entry / "lock").touch()
    (tmp_path / "a" / "tmp.x").mkdir()
    gpu_files.pack(tmp_path / "a", tmp_path)
    with tarfile.open(tmp_path / "cache-0.tar.gz") as tar:
        names = {"k.cubin", "k.json", "__grp__k.json"}
        assert set(tar.getnames()) == {f"KERNEL1/{name}" for name in names}


def test_archives_are_small_and_few_and_the_newest_kernels_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_files, "ARCHIVE_BYTES", 100_000)
    monkeypatch.setattr(gpu_files, "PENDING", 30_000)
    for i in range(20):
        compile_into(tmp_path / "a", f"KERNEL{i}", size=20_000, age=i)
    left = gpu_files.pack(tmp_path / "a", tmp_path)
    archives = sorted(tmp_path.glob("cache-*"))
    assert [path.name for path in archives] == [f"cache-{i}.tar.gz" for i in range(3)]
    assert all(60_000 < path.stat().st_size <= 100_000 for path in archives)
    gpu_files.unpack(tmp_path, tmp_path / "b")
    kept = {path.name for path in (tmp_path / "b").iterdir()}
    assert kept == {f"KERNEL{i}" for i in range(20 - left)}
    assert len(kept) >= 9
    for i in range(1, 20):
        for path in (tmp_path / "a" / f"KERNEL{i}").iterdir():
            path.unlink()
        (tmp_path / "a" / f"KERNEL{i}").rmdir()
    gpu_files.pack(tmp_path / "a", tmp_path)
    assert [path.name for path in tmp_path.glob("cache-*")] == ["cache-0.tar.gz"]


def test_a_broken_archive_is_left_out_with_a_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compile_into(tmp_path / name, f"KERNEL{name}", size=50_000)
    gpu_files.pack(tmp_path / "a", tmp_path)
    whole = (tmp_path / "cache-0.tar.gz").read_bytes()
    gpu_files.pack(tmp_path / "b", tmp_path)
    for i, broken in enumerate((whole[: len(whole) // 2], b"no archive", b"")):
        (tmp_path / f"cache-{i + 1}.tar.gz").write_bytes(broken)
    lines = gpu_files.unpack(tmp_path, tmp_path / "c")
    assert [line.partition(" is broken")[0] for line in lines] == [
        str(tmp_path / f"cache-{i}.tar.gz") for i in (1, 2, 3)
    ]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["KERNELb"]


@pytest.mark.parametrize("name", ["../../outside", "a/../../outside", "/tmp/x/../../outside"])
def test_an_archive_writes_nowhere_else(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "cache-0.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    (line,) = gpu_files.unpack(tmp_path, tmp_path / "deep" / "cache")
    assert "is broken and was left out" in line
    assert {path.name for path in tmp_path.rglob("*")} == {"cache-0.tar.gz", "deep", "cache"}


NOW = {"source": "1", "gpu": "x"}


def left_there(folder: Path, **states: dict[str, str]) -> Path:
    """A folder with results of these states by part."""
    folder.mkdir()
    for part, state in states.items():
        gpu_files.write(folder / f"{part}.json", {"state": state, "of": folder.name})
    return folder


def test_results_are_taken_over_only_if_they_are_of_this_code(tmp_path: Path) -> None:
    chosen = {**NOW, "tests": "lora", "source": "0"}
    old = left_there(tmp_path / "old", tests=NOW, engine=chosen, smoke=NOW, tune=NOW, profile=NOW)
    new = left_there(tmp_path / "new", smoke=NOW, profile={**NOW, "gpu": "y"})
    (old / "sm90.json").write_text('{"table": 1}')
    lines = gpu_files.take_results(old, new, NOW)
    assert lines == [
        f"{old}/engine.json is not gone on with: it is of other code and other TESTS",
        f"{old}/smoke.json is not gone on with: OUT has its own",
    ]
    found = {path.stem: gpu_files.read(path).get("of") for path in new.iterdir()}
    taken = dict.fromkeys(("tests", "tune", "profile"), "old")  # what was stale is replaced
    assert found == {"smoke": "new", "sm90": None, **taken}


def test_what_out_holds_of_other_code_is_named(tmp_path: Path) -> None:
    out = left_there(tmp_path / "out", smoke=NOW, tests={**NOW, "gpu": "y"})
    (out / "kernels.json").write_text("{")
    assert gpu_files.take_results(out, out, NOW) == [
        f"{out}/kernels.json cannot be read",
        f"{out}/tests.json is not gone on with: it is of another GPU",
    ]


def test_a_folder_without_results_is_said_to_be_one(tmp_path: Path) -> None:
    empty, out = left_there(tmp_path / "empty"), left_there(tmp_path / "out")
    assert gpu_files.take_results(out, out, NOW) == []
    assert gpu_files.take_results(empty, out, NOW) == [f"FROM={empty} holds nothing to go on from"]


def test_the_state_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_files, "ROOT", tmp_path)
    monkeypatch.delenv("TESTS", raising=False)
    (tmp_path / "kernels").mkdir()
    path = tmp_path / "kernels" / "lora.py"
    path.write_text("x = 1")
    before = gpu_files.state(rehearse=True)
    (tmp_path / "kernels" / "notes.txt").write_text("nothing")
    assert gpu_files.state(rehearse=True) == before
    assert gpu_files.state(rehearse=False)["gpu"] != before["gpu"]
    path.write_text("x = 2")
    assert gpu_files.state(rehearse=True)["source"] != before["source"]
    monkeypatch.setenv("TESTS", "lora")
    assert gpu_files.state(rehearse=True)["tests"] == "lora"
