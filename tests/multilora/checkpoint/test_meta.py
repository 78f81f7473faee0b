"""Meta's layout. Oracles: the inverse row order that `model_folders` writes, and two rotations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora.checkpoint.reader import read_config
from multilora.errors import CheckpointError
from tests.harness import model_folders as make
from tests.harness.checkpoint_loading import (
    assert_same,
    loaded,
    refused,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("split_embedding", ["vocab", "features"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_meta_weights_are_those_of_hugging_face(
    tmp_path: Path, shards: int, split_embedding: str, tied: bool
) -> None:
    config = make.write_meta_checkpoint(
        tmp_path,
        shards=shards,
        split_embedding=split_embedding,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )
    want = make.random_weights(config, dtype=torch.bfloat16)
    assert_same(loaded(tmp_path, config, dtype=torch.bfloat16), want)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("shards", "split_embedding"), [(1, "vocab"), (2, "vocab"), (2, "features")]
)
def test_vocabulary_size_is_read_from_the_weights(
    tmp_path: Path, shards: int, split_embedding: str
) -> None:
    config = make.write_meta_checkpoint(
        tmp_path,
        shards=shards,
        split_embedding=split_embedding,
        params_overrides={"vocab_size": -1},  # as in Llama 2
    )
    assert read_config(tmp_path) == config


def test_row_order_keeps_the_attention_scores_of_meta(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    raw = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    ours = loaded(tmp_path, config)
    x = torch.randn(5, config.hidden_size)

    def rotated(rows: Tensor, pairs: bool) -> Tensor:
        y = (x @ rows.T).unflatten(-1, (-1, config.head_dim))  # [tokens, heads, head_dim]
        half = config.head_dim // 2
        angle = torch.arange(5.0)[:, None, None] * 10_000 ** (-torch.arange(half) / half)
        a, b = (y[..., 0::2], y[..., 1::2]) if pairs else (y[..., :half], y[..., half:])
        turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.cat(turned, -1)

    def scores(wq: Tensor, wk: Tensor, pairs: bool) -> Tensor:
        q, k = rotated(wq, pairs), rotated(wk, pairs).repeat_interleave(2, 1)
        return torch.einsum("thd,shd->hts", q, k)

    theirs = scores(*(raw[f"layers.0.attention.{w}.weight"] for w in ("wq", "wk")), pairs=True)
    got = scores(*(ours[f"model.layers.0.self_attn.{m}_proj.weight"] for m in "qk"), pairs=False)
    torch.testing.assert_close(got, theirs)


def edit_shard(folder: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / f"consolidated.{number:02d}.pth"
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def meta_faults() -> Iterator[Any]:
    wq = "layers.0.attention.wq.weight"
    yield pytest.param(lambda w: w.pop(wq), [wq, "consolidated.01.pth"], id="missing in one shard")
    yield pytest.param(
        lambda w: w.update({wq: torch.ones(32, 60)}), [wq, "[32, 60]", "[32, 64]"], id="width"
    )
    yield pytest.param(
        lambda w: w.update({wq: torch.ones(16, 64)}), [Q, "[48, 64]", "[64, 64]"], id="rows"
    )
    yield pytest.param(lambda w: w.update({wq: w[wq].half()}), [wq, "float16"], id="dtype")
    yield pytest.param(lambda w: w.update({wq: torch.tensor(1.0)}), [wq, "[]"], id="scalar")
    yield pytest.param(lambda w: w.update({wq: 3}), [wq, "not a plain tensor"], id="number")
    yield pytest.param(
        lambda w: w.update({wq: w[wq].to_sparse()}), [wq, "not a plain tensor"], id="sparse"
    )


@pytest.mark.parametrize(("change", "texts"), list(meta_faults()))
def test_names_the_fault_of_a_meta_shard(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], texts: list[str]
) -> None:
    config = make.write_meta_checkpoint(tmp_path, shards=2)
    edit_shard(tmp_path, 1, change)
    text = refused(tmp_path, config)
    assert all(part in text for part in texts), text


def test_names_missing_and_extra_meta_weights(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    edit_shard(tmp_path, 0, lambda w: w.update({"layers.0.attention.wq.bias": torch.ones(64)}))
    assert "layers.0.attention.wq.bias" in refused(tmp_path, config)
    edit_shard(tmp_path, 0, lambda w: w.pop("layers.0.attention.wq.weight"))
    assert f"lacks 1 of the model's 21 weights: {Q}" in refused(tmp_path, config)


def test_refuses_int8_meta_weights(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    edit_shard(tmp_path, 0, lambda w: w.update({"norm.weight": w["norm.weight"].to(torch.int8)}))
    assert "model.norm.weight has dtype int8" in refused(tmp_path, config)


def test_names_a_gap_in_the_numbers_of_meta_shards(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path, shards=2)
    (tmp_path / "consolidated.00.pth").unlink()
    assert "lacks consolidated.00.pth" in refused(tmp_path, config)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_payload_is_refused_and_does_not_run(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    marker, control = tmp_path / "marker", tmp_path / "control"
    file = tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(64), "x": _Payload(control)}, file)
    torch.load(file, weights_only=False)
    assert control.exists()  # the payload is a real one
    torch.save({"norm.weight": torch.ones(64), "x": _Payload(marker)}, file)
    assert str(file) in refused(tmp_path, config)
    with pytest.raises(CheckpointError, match="more than"):
        read_config(tmp_path)
    assert not marker.exists()


def test_every_truncation_of_a_meta_file_names_it(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    file = tmp_path / "consolidated.00.pth"
    whole = file.read_bytes()
    for size in [0, 1, 8, len(whole) - 1, *range(100, len(whole), len(whole) // 15)]:
        file.write_bytes(whole[:size])
        assert str(file) in refused(tmp_path, config), size


def test_refuses_a_meta_file_that_is_no_table(tmp_path: Path) -> None:
    torch.save([torch.ones(3)], tmp_path / "consolidated.00.pth")
    assert "no table of tensors" in refused(tmp_path, make.TINY)
