"""What is missing, and a GPU that is not there, are said in a line before anything runs."""

from __future__ import annotations

import sys

import gpu_preflight
import pytest


def lacks(patch: pytest.MonkeyPatch, *names: str) -> None:
    found = gpu_preflight.find_spec
    patch.setattr(gpu_preflight, "find_spec", lambda name: None if name in names else found(name))


def test_what_every_part_needs_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_preflight.refusal(rehearse=True) == ""
    lacks(monkeypatch, "torch", "triton", "peft")
    said = f"missing in {sys.executable}: torch, triton; no part runs without"
    for rehearse in (False, True):
        assert gpu_preflight.refusal(rehearse=rehearse) == said


def test_what_may_be_missing_is_named_with_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_preflight.spared() == ([], "")
    lacks(monkeypatch, "transformers", "peft", "pytest")
    lost, line = gpu_preflight.spared()
    assert lost == ["transformers", "peft", "pytest"]
    assert line == (
        "missing: transformers, peft, pytest; "
        "left out: transformers with PEFT in part engine, part tests"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", ""),
        ("raise KeyError('no driver')", "no GPU: KeyError: 'no driver'"),
        ("import os; os.abort()", "no GPU: status -6"),
        ("import time; time.sleep(99)", "no GPU: it did not answer within 1 s"),
    ],
)
def test_a_gpu_that_does_not_answer(code: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_preflight, "PATIENCE", 1)
    assert gpu_preflight.ask_gpu([sys.executable, "-I", "-S", "-c", code]) == said
