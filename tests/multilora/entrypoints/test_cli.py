"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from multilora import __version__
from multilora.checkpoint.reader import read_base_weight, read_config
from multilora.entrypoints import cli, demo
from tests.harness.adapter_folders import change_config, change_tensors, write_adapter
from tests.harness.command_line import run
from tests.harness.model_folders import TINY, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("typer")
pytest.importorskip("rich")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in ("version", "--version"):
        assert run(capsys, spelling) == (0, f"{__version__}\n", "")


def test_threads_spin_shortly_unless_the_user_says_how_they_wait(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, spins in (
        ({}, cli.SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ):
        with monkeypatch.context() as patch:
            for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
                patch.setenv(name, "")  # so that the context removes what the command sets
                patch.delenv(name)
            for name, value in given.items():
                patch.setenv(name, value)
            run(capsys, "version")
            assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.seconds
def test_the_command_line_sets_it_before_torch_and_the_library_never(
    run_python: Callable[..., str],
) -> None:
    assert run_python(
        "import sys; from multilora.entrypoints import cli; print('torch' in sys.modules)"
    ) == ("False\n")
    uses = "before = dict(os.environ); multilora.LLM, multilora.Engine; "
    code = f"import os, multilora; {uses}print(before == dict(os.environ))"
    assert run_python(code) == "True\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in ("generate", "info", "demo", "adapters", "version"))


def test_check_prints_what_an_adapter_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "a", TINY, rank=4, targets=("q_proj", "down_proj"))
    code, out, _ = run(capsys, "adapters", "check", tmp_path / "a", "--model", tmp_path / "base")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert len(lines["digest"]) == 64
    assert lines["rank"] == "4"
    assert lines["sites"] == "qkv 4, down 4"
    assert lines["modules"] == "4"  # two linears in two layers
    assert lines["bytes"] == str(2 * 4 * 4 * (64 + 64 + 96 + 64))


def test_check_refuses_with_the_typed_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "base")
    change_config(write_adapter(tmp_path / "a", TINY), modules_to_save=["mlp"])
    code, out, err = run(capsys, "adapters", "check", tmp_path / "a", "--model", tmp_path / "base")
    assert (code, out) == (1, "")
    assert err.startswith("error: adapter at ")
    assert "modules_to_save" in err


def test_ctrl_c_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        sys.stdout.write("one\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "show", interrupted)
    assert run(capsys, "demo") == (130, "one\n", "")


@pytest.mark.seconds
@pytest.mark.parametrize("count", [1, 100_000])
def test_a_closed_pipe_ends_quietly(count: int) -> None:
    """Also one that is closed when only what is buffered is left to write."""
    code = (
        "import sys; from multilora.entrypoints import cli; "
        f"cli.__version__ = 'x' * {count}; sys.stdin.read(); cli.main(['version'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 141


def test_what_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "typer" else object())
    code, _, err = run(capsys, "version")
    assert code == 1
    assert "needs typer" in err
    assert "pip install 'multilora[cli]'" in err


def test_check_refuses_what_loading_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that brings another embedding than the base has."""
    write_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "a", TINY, targets=("embed_tokens",))
    own = read_base_weight(tmp_path / "base", "embed", read_config(tmp_path / "base"))
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    command = ("adapters", "check", tmp_path / "a", "--model", tmp_path / "base")
    for weight, rows, status in ((own.clone(), "", 0), (own * 1.5, "128", 0), (own * 1.5, "9", 1)):
        change_tensors(tmp_path / "a", lambda tensors, w=weight: tensors.update({name: w}))
        options = ("--max-lora-token-rows", rows) if rows else ()
        code, out, err = run(capsys, *command, *options)
        assert (code, "changes 128 rows" in err) == (status, bool(status))
        assert ("rows     128 of embed" in out) == (rows == "128")


def test_an_adapter_is_converted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", TINY)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    out = tmp_path / "b"
    status, text, _ = run(capsys, "adapters", "convert", str(folder), str(out))
    assert (status, text) == (
        0,
        f"{folder} is a PEFT adapter with pickled weights; written as {out}\n",
    )
    status, text, error = run(capsys, "adapters", "convert", str(folder), str(out))
    assert (status, text) == (1, "")
    assert "exists" in error
