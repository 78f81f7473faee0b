"""What went wrong elsewhere with files: code in them that ran, and libraries that let it."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from multilora.adapters.peft.files import open_regular
from multilora.errors import AdapterError, AdapterInvalid
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.adapter_folders import change_config
from tests.harness.tiny_engines import Job, facts, make_engine, run

if TYPE_CHECKING:
    from .conftest import World

CHECKOUT = Path(__file__).resolve().parents[3]
TOKENIZER = CHECKOUT / "multilora" / "assets" / "uma" / "base"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the code in the files would write."""
    return tmp_path / "ran"


def plant_module(folder: Path, marker: Path, patch: pytest.MonkeyPatch) -> None:
    """A Python file beside the others that leaves the marker, and that an import would find."""
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Planted: ...\n")
    patch.syspath_prepend(folder)


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_code_that_a_base_names(
    world: World, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2025-66448, CVE-2026-22807: `auto_map` ran though nobody trusted remote code."""
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = dict.fromkeys(names, "planted.Planted")
    base, tokenizer = tmp_path / "base", tmp_path / "tokenizer"
    shutil.copytree(world.root / "base", base)
    shutil.copytree(TOKENIZER, tokenizer)
    change_json(base / "config.json", auto_map=auto_map)
    change_json(tokenizer / "tokenizer_config.json", auto_map=auto_map)
    for folder in (base, tokenizer):
        plant_module(folder, marker, monkeypatch)
    job = world.job()
    assert facts(run(make_engine(base), [job])[0]) == world.alone(job)
    assert load_tokenizer(tokenizer).encode("a") == load_tokenizer(TOKENIZER).encode("a")
    assert not marker.exists()


def test_code_that_an_adapter_brings(
    world: World, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2026-5760, CVE-2024-34359: a template ran; PEFT's `auto_mapping` names classes."""
    folder = tmp_path / "mine"
    shutil.copytree(world.root / "a", folder)
    plant_module(folder, marker, monkeypatch)
    change_config(folder, auto_mapping={"base_model_class": "Planted", "parent_library": "planted"})
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    (folder / "chat_template.jinja").write_text(escape)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": escape}))
    engine, job = world.engine(), world.job("a")
    engine.load_adapter("a", folder)
    assert facts(run(engine, [job])[0]) == world.alone(job)
    assert not marker.exists()


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
def test_a_pickle_in_place_of_the_weights(
    name: str, world: World, tmp_path: Path, marker: Path
) -> None:
    """TensorRT-LLM #13391, CVE-2025-32434, CVE-2025-24357: a download that is a program."""
    folder = tmp_path / "mine"
    shutil.copytree(world.root / "a", folder)
    (folder / name).write_bytes(pickle.dumps(_Payload(marker)))
    engine = world.engine()
    engine.load_adapter("a", folder)  # its weights lie there too: the pickle is nobody's business
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError):
        engine.load_adapter("a", folder)
    (folder / name).rename(folder / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid):
        engine.load_adapter("a", folder)
    assert not marker.exists()
    world.check(engine, [world.job("a")])


STRANGE = ("mem", "environ", "clear_refs", "attr/current", "pagemap")


@pytest.mark.skipif(sys.platform != "linux", reason="has no /proc")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_the_system_made(name: str, world: World, tmp_path: Path) -> None:
    """CVE-2026-24208, CVE-2024-37032: a name led to /proc. Its files only look regular."""
    engine = world.engine()
    for number, target in enumerate([*STRANGE, "../kmsg"]):
        folder = tmp_path / str(number)
        shutil.copytree(world.root / "a", folder)
        (folder / name).unlink()
        (folder / name).symlink_to(f"/proc/self/{target}")
        with pytest.raises(AdapterInvalid) as caught:
            engine.load_adapter("a", folder)
        assert str(folder) in str(caught.value)
    assert engine.adapters == {}


class _FailingFile(io.BufferedReader):
    """A file of which one read fails, after `left` that do not."""

    left = 0

    def _count(self) -> None:
        if not _FailingFile.left:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        _FailingFile.left -= 1

    def read(self, size: int | None = -1) -> bytes:
        self._count()
        return super().read(size)

    def readinto(self, buffer: Any) -> int:
        self._count()
        return super().readinto(buffer)


def test_a_disk_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that fails midway leaves what was there, at whichever read, and can be repeated."""
    engine, job = world.engine("a"), world.job("a")
    before = engine.adapters
    for number in range(6):
        with monkeypatch.context() as patch:
            _FailingFile.left = number
            opened = lambda *args: _FailingFile(open_regular(*args).detach())  # noqa: E731
            patch.setattr("multilora.adapters.peft.reader.open_regular", opened)
            with pytest.raises(AdapterInvalid, match="cannot be read: Input/output error"):
                engine.load_adapter("a", world.root / "b")
        assert engine.adapters == before
    world.check(engine, [job])
    engine.load_adapter("a", world.root / "b")
    assert facts(run(engine, [job])[0]) == world.alone(Job(job.prompt, job.params, "b"))


@pytest.mark.parametrize(
    ("library", "least"),
    [
        ("jinja2", (3, 1, 6)),  # CVE-2024-56326, CVE-2025-27516: ways out of its sandbox
        ("torch", (2, 6, 0)),  # CVE-2025-32434: torch.load(weights_only=True) ran code
    ],
)
def test_a_library_with_a_known_hole_is_not_taken(library: str, least: tuple[int, ...]) -> None:
    """What lets code out of a file must not be installed beside us."""
    entries = (CHECKOUT / "pyproject.toml").read_text()
    found = re.search(rf'^  "{library}>=([0-9.]+)"', entries, re.MULTILINE)
    assert found is not None
    parts = [int(part) for part in found[1].split(".")]
    assert tuple(parts + [0] * (3 - len(parts))) >= least
