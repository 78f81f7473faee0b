"""What the tests of the engine share: tiny models and adapters on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.paths import UMA
from tests.harness.recovery import NAMES, World
from tests.harness.tiny_engines import make_engine

if TYPE_CHECKING:
    from pathlib import Path

    from multilora.engine.engine import Engine


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("recovery")
    write_checkpoint(root / "base", num_layers=1)
    config = replace(TINY, num_layers=1)
    for seed, name in enumerate(NAMES):
        write_adapter(root / name, config, rank=8 + 8 * seed, seed=seed, scale=0.4)
    return World(root, {})


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    write_checkpoint(root / "base")
    for seed, name in enumerate(("a", "b", "c")):
        write_adapter(root / name, TINY, rank=8 * (seed + 1), seed=seed, scale=0.3)
    return root


@pytest.fixture
def engine(root: Path) -> Engine:
    return make_engine(root / "base", {name: root / name for name in "ab"})


@pytest.fixture(scope="session")
def writer(root: Path) -> Engine:
    """An engine that reads and writes text."""
    vocab = load_tokenizer(UMA / "base").vocab_size
    write_checkpoint(root / "text", vocab_size=vocab, eos_token_ids=())
    return make_engine(root / "text", skip_tokenizer_init=False, tokenizer=str(UMA / "base"))
