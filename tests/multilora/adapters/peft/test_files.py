"""What lies in an adapter folder: two regular files of bounded size, and nothing else is opened."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from multilora.adapters.peft.reader import read_adapter
from multilora.errors import AdapterInvalid
from tests.harness.adapter_folders import CONFIG, write_adapter
from tests.harness.refused_adapters import assert_refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.bin")  # to open it would wait for ever


def _replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no such folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors cannot be opened: No such file",
    ),
    "pickle": (_only_pickle, "pickle is never read"),
    "config is a pipe": (_replace("adapter_config.json", os.mkfifo), "is not a regular file"),
    "weights are a pipe": (_replace("adapter_model.safetensors", os.mkfifo), "not a regular file"),
    "config is a device": (
        _replace("adapter_config.json", lambda p: p.symlink_to("/dev/zero")),
        "is not a regular file",
    ),
    "config is a folder": (_replace("adapter_config.json", os.mkdir), "is not a regular file"),
    "link to nowhere": (
        _replace("adapter_config.json", lambda p: p.symlink_to("x")),
        "No such file",
    ),
    "link to itself": (
        _replace("adapter_config.json", lambda p: p.symlink_to(p)),
        "adapter_config.json cannot be opened",
    ),
    "config too large": (
        _replace("adapter_config.json", _sparse((1 << 20) + 1)),
        "above the limit",
    ),
    "weights too large": (
        _replace("adapter_model.safetensors", _sparse((4 << 30) + 1)),
        "above the limit of 4294967296",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("change", "fragment"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_refuses_folders_without_two_regular_files(
    change: Callable[[Path], Any], fragment: str, tmp_path: Path
) -> None:
    change(write_adapter(tmp_path, CONFIG))
    assert_refused(tmp_path, fragment)


def test_a_folder_with_one_named_adapter_is_that_adapter(tmp_path: Path) -> None:
    """What PEFT's `save_pretrained` makes of an adapter that is not called "default"."""
    one = write_adapter(tmp_path / "one", CONFIG)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "README.md").write_text("#")
    assert read_adapter(tmp_path, CONFIG).digest == read_adapter(one, CONFIG).digest
    write_adapter(tmp_path / "other", CONFIG, seed=1)
    with pytest.raises(AdapterInvalid, match=r"there are 2 adapters in it; .*: 'one', 'other'$"):
        read_adapter(tmp_path, CONFIG)
    own = write_adapter(tmp_path, CONFIG, seed=2)  # one beside them is meant itself
    assert read_adapter(own, CONFIG).digest != read_adapter(one, CONFIG).digest


def test_refuses_a_path_that_no_system_knows() -> None:
    with pytest.raises(AdapterInvalid, match="no such folder"):
        read_adapter("a\0b", CONFIG)
    with pytest.raises(AdapterInvalid, match="no such folder"):
        read_adapter("a" * 10_000, CONFIG)
