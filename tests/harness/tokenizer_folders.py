"""Folders with a tokenizer, and what transformers makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from multilora.tokenization.chat_template import ChatTemplate
from tests.harness.paths import UMA

BASE = UMA / "base"


def copy_files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(BASE / name, folder)
    return folder


def oracle_of(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def template_of(source: str, **limits: float) -> ChatTemplate:
    return ChatTemplate({"default": source}, origin="the test", variables={}, **limits)
