"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from multilora import __version__
from multilora.entrypoints import cli, demo
from tests.harness.adapter_folders import change_config, write_adapter
from tests.harness.command_line import run
from tests.harness.model_folders import TINY, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("typer")
pytest.importorskip("rich")
PROMPT = demo.load_scene(1).prompts["feedback"]
ANSWER = demo.load_scene(1).answers["feedback"]


def generate_args(*more: object) -> list[object]:
    with demo.assets() as folder:
        adapter = f"feedback={folder / 'adapters' / 'feedback'}"
        return ["generate", folder / "base", "--adapter", adapter, *more]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "version") == (0, f"{__version__}\n", "")


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
    assert all(name in out for name in ("generate", "demo", "adapters", "version"))


@pytest.mark.seconds
def test_generate_streams_an_adapters_answer(capsys: pytest.CaptureFixture[str]) -> None:
    args = generate_args("--prompt", PROMPT, "--use", "feedback", "--max-tokens", 12)
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    assert len(out) > 20
    assert ANSWER.startswith(out.rstrip("\n"))


@pytest.mark.seconds
def test_generate_quantizes_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    args = generate_args("--prompt", PROMPT, "--use", "feedback", "--max-tokens", 4)
    options = ("--quantization", "int4", "--quantization-group-size", "128")
    options += ("--kv-cache-dtype", "int8")
    code, out, err = run(capsys, *args, *options)
    assert (code, err) == (0, "")
    assert len(out) > 4


@pytest.mark.seconds
def test_generate_can_run_a_shape_with_random_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with demo.assets() as folder:
        for name in ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            if (folder / "base" / name).is_file():
                (tmp_path / name).write_bytes((folder / "base" / name).read_bytes())
    args = ["generate", tmp_path, "--prompt", "Hi", "--no-chat", "--max-tokens", 3]
    code, out, err = run(capsys, *args)
    assert (code, out) == (1, "")
    assert "holds no weights" in err
    code, _, err = run(capsys, *args, "--load-format", "dummy")
    assert (code, err) == (0, "")


def test_a_missing_gpu_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = run(capsys, *generate_args("--prompt", PROMPT, "--device", "cuda"))
    assert (code, out) == (1, "")
    assert err.startswith("error: device 'cuda' cannot be used")
    assert err.count("\n") == 1


@pytest.mark.seconds
def test_generate_answers_several_prompts_under_their_headings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = generate_args("--prompt", "One", "--prompt", "Two", "--no-chat", "--max-tokens", 3)
    code, out, _ = run(capsys, *args, "--use", "feedback=0.5")
    assert code == 0
    assert out.index("== One ==") < out.index("== Two ==")


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--use", "nobody"), "nobody"),
        (("--use", "feedback=much"), "name=weight"),
        (("--use", "feedback=1", "--use", "feedback=1"), "twice"),
        (("--adapter", "feedback"), "name=folder"),
        (("--adapter", "feedback=x"), "twice"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--dtype", "int4"), "dtype"),
        (("--quantization", "int2"), "quantization"),
        (("--quantization", "int8", "--quantization-group-size", "7"), "group_size"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    code, out, err = run(capsys, *generate_args("--prompt", "Hello", *options))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


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
    change_config(write_adapter(tmp_path / "a", TINY), use_dora=True)
    code, out, err = run(capsys, "adapters", "check", tmp_path / "a", "--model", tmp_path / "base")
    assert (code, out) == (1, "")
    assert err.startswith("error: adapter at ")
    assert "DoRA" in err or "dora" in err


def test_what_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "typer" else object())
    code, _, err = run(capsys, "version")
    assert code == 1
    assert "needs typer" in err
    assert "pip install 'multilora[cli]'" in err
