"""The certificate: an adapter as PEFT has it passes, and one that is served as another does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from multilora.adapters.peft import reader
from multilora.entrypoints.commands import verify
from tests.harness.adapter_folders import write_adapter
from tests.harness.command_line import run
from tests.harness.model_folders import TINY, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("peft")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"use_dora": True, "modules_to_save": ["norm"], "trainable_token_indices": [3, 50]},
    "activated": {"alora_invocation_tokens": [7, 9]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    write_checkpoint(root)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_certificate_says_what_was_compared(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_adapter(tmp_path / "a", TINY, scale=0.2, **KINDS[kind])
    command = ("adapters", "verify", folder, "--model", base)
    status, out, err = run(capsys, *command)
    assert (status, err.count("error")) == (0, 0)
    found = json.loads(out)
    assert found["passed"]
    assert found["digest"] == reader.read_adapter(folder, TINY).digest
    assert 0 < found["worst"] <= found["tolerance"] == 1e-4
    assert found["logprobs"] >= 20 * (sum(verify.LENGTHS) - 3 + 3 * verify.NEW_TOKENS)
    assert (found["prompts"], found["other_tokens"]) == (3, 0)
    assert {"multilora", "torch", "transformers", "peft"} == found["versions"].keys()
    assert run(capsys, *command, "--out", tmp_path / "c.json")[:2] == (0, "")
    assert json.loads((tmp_path / "c.json").read_text())["worst"] == found["worst"]


def test_another_scale_is_found(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if `use_rslora` were not looked at."""
    folder = write_adapter(tmp_path / "a", TINY, scale=0.2, use_rslora=True)
    plain = reader.parse_config

    def without(data: bytes) -> Any:
        return plain(data.replace(b'"use_rslora": true', b'"use_rslora": false'))

    monkeypatch.setattr(reader, "parse_config", without)
    status, out, err = run(capsys, "adapters", "verify", folder, "--model", base)
    assert status == 1
    assert not json.loads(out)["passed"]
    assert "differs from PEFT by up to" in err


def test_without_peft_it_says_what_to_install(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "find_spec", lambda name: None if name == "peft" else name)
    status, _, err = run(capsys, "adapters", "verify", tmp_path, "--model", base)
    assert (status, "pip install peft" in err) == (1, True)
