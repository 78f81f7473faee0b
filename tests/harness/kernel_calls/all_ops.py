"""One call of every op, as its public function and as torch's dispatcher sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import multilora_kernels as mk

from .attention import MIXED, make_attention_call
from .lora import make_columns_call, make_embedding_call, make_lora_call
from .rope import make_rope_call


class OpCall(NamedTuple):
    """A public function with arguments; those of the op are the same with tuples taken apart."""

    op: str
    function: Callable[..., Any]
    args: tuple[Any, ...]

    @property
    def flat(self) -> tuple[Any, ...]:
        """The op's own arguments."""
        flat: list[Any] = []
        for arg in self.args:
            flat += (
                arg
                if isinstance(arg, mk.Table | mk.Tiles | mk.Columns | mk.PackedWeight)
                else [arg]
            )
        return tuple(list(arg) if type(arg) is tuple else arg for arg in flat)


def _attend(*args: Any) -> Tensor:
    tensors, (scale, max_query_len, max_seq_len, k_scale, v_scale) = args[:6], args[6:]
    return mk.paged_attention(
        *tensors, scale=scale, max_query_len=max_query_len, max_seq_len=max_seq_len,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def _add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, *own: Tensor) -> Tensor:
    return mk.rms_norm(x, weight, eps, residual, *own)


def all_op_calls() -> dict[str, OpCall]:
    """By op. No argument holds NaN, which compares with nothing; slots have unequal ranks."""
    lora = make_lora_call([3, 0, 0, -1, 2], torch.float32, dora=True)
    lora = lora._replace(
        a_pages=lora.a_pages.nan_to_num(),
        b_pages=lora.b_pages.nan_to_num(),
        table=mk.Table(*(None if t is None else t.nan_to_num() for t in lora.table)),
    )
    embed = make_embedding_call([3, 0, 0, -1, 2], torch.float32)
    attention = make_attention_call(MIXED, torch.float32)
    shared = lora.table, lora.tiles
    planes = torch.randn(2, len(lora.y), 3 * lora.table.page_ids.shape[1] * 8)
    x, rows = torch.randn(4, 6), torch.ones(4)
    limits = torch.full((4,), 5), rows.double(), rows.double() - 1, torch.arange(4)
    calls = [
        OpCall("lora_shrink", mk.lora_shrink, (lora.x, lora.a_pages, *shared, 2)),
        OpCall("lora_splits", mk.lora_splits, (lora.x, lora.a_pages)),
        OpCall("lora_expand_", mk.lora_expand_,
               (lora.y, planes, lora.b_pages, *shared, lora.slice_starts)),
        OpCall("lora_", mk.lora_, (*lora,)),
        OpCall("lora_embed_", mk.lora_embed_, (
            embed.y, embed.ids, embed.a_pages.nan_to_num(), embed.b_pages.nan_to_num(), *shared)),
        OpCall("lora_columns_", mk.lora_columns_, (*make_columns_call([3, 0, 0, -1, 2]),)),
        OpCall("paged_attention", _attend, (
            *(t.nan_to_num() for t in attention), attention.scale, 64, 130, None, None)),
        OpCall("rope_store_kv_", mk.rope_store_kv_, (*make_rope_call(torch.float32),)),
        OpCall("rms_norm", mk.rms_norm, (x, torch.randn(6), 1e-5)),
        OpCall("add_rms_norm_", _add_rms_norm, (
            torch.randn(4, 6), x, torch.randn(6), 1e-5, torch.randn(2, 6),
            torch.tensor([1, -1, 0, 1], dtype=torch.int32))),
        OpCall("silu_mul", mk.silu_mul, (x,)),
        OpCall("apply_token_mask_", mk.apply_token_mask_,
               (x, torch.tensor([[5]] * 4, dtype=torch.int32))),
        OpCall("top_logprobs", mk.top_logprobs, (x, torch.tensor([5, 0, 1, 2]), 2)),
        OpCall("draw", mk.draw, (x, rows, *limits)),
        OpCall("linear", mk.linear, (x, torch.randn(3, 6), torch.randn(3))),
        OpCall("linear_packed", mk.linear, (x, mk.pack(torch.randn(3, 6)), torch.randn(3))),
    ]  # fmt: skip
    return {call.op: call for call in calls}
