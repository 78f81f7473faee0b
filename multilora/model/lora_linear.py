"""Linears and embeddings of the base, and each row's own LoRA delta on top of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import multilora_kernels as mk

from ..checkpoint.parts import Part, fill
from ..config.lora_sites import Site
from ..config.quantization import Scheme
from ..errors import CheckpointError
from .forward_batch import ForwardBatch


class Linear(nn.Module):
    """A fused linear of the base.

    Its weight is [0, in] until its part is loaded. Then it is a plain tensor, or packed where that
    is faster, or quantised.
    """

    weight: Tensor | mk.PackedWeight

    def __init__(
        self,
        site: Site,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__()
        self.site, self.scheme = site, scheme
        self.weight = torch.empty(0, site.in_, dtype=dtype)
        self.bias = _parameter(site.out, dtype=dtype) if bias else None

    def forward(self, x: Tensor, batch_invariant: bool) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""
        return mk.linear(x, self.weight, self.bias, batch_invariant=batch_invariant)

    def part(self, modules: Sequence[str]) -> Part:
        """What loads it; `modules` are the paths of its slices in the checkpoint."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path, part in zip(modules, self.site.slices, strict=True):
            shapes[f"{path}.weight"] = (part.out, self.site.in_)
            if self.bias is not None:
                shapes[f"{path}.bias"] = (part.out,)
        return Part(shapes, lambda read: self._load(modules, read))

    def _load(self, paths: Sequence[str], read: Callable[[str], Tensor]) -> None:
        names, starts = [f"{path}.weight" for path in paths], self.site.slice_starts
        if self.scheme is not None:
            self.weight = self._quantized(names, self.scheme, read)
        else:
            weight = self._empty()
            for name, (first, last) in zip(names, pairwise(starts), strict=True):
                weight[first:last].copy_(read(name))
            self.weight = mk.pack(weight) if mk.worth_packing(weight) else weight
        if self.bias is not None:
            for path, (first, last) in zip(paths, pairwise(starts), strict=True):
                self.bias[first:last].copy_(read(f"{path}.bias"))

    def _empty(self) -> Tensor:
        assert isinstance(self.weight, Tensor)
        like, shape = self.weight, (self.site.out, self.site.in_)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _quantized(
        self, names: Sequence[str], scheme: Scheme, read: Callable[[str], Tensor]
    ) -> mk.PackedWeight:
        """Slice by slice, from the checkpoint's dtype: no row depends on another."""
        codes, scales = [], []
        for name in names:
            try:
                found = mk.quantize(read(name), scheme.bits, scheme.group)
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}; leave out quantization") from error
            codes.append(found[0])
            scales.append(found[1])
        group = scheme.group or self.site.in_
        return mk.pack_quantized(torch.cat(codes), torch.cat(scales), scheme.bits, group)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, [tokens, in], by ids int64 [tokens]: the embedding tied to a head."""
        if isinstance(self.weight, mk.PackedWeight):
            return mk.unpack_rows(self.weight, ids).to(dtype)
        return self.weight[ids].to(dtype)

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row's bits are its own for any number of rows, without padding."""
        return isinstance(self.weight, mk.PackedWeight) and self.weight.in_panels

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight; the bias is a parameter."""
        if isinstance(self.weight, mk.PackedWeight):
            return self.weight.num_bytes
        return self.weight.numel() * self.weight.element_size()


class LoraLinear(nn.Module):
    """A fused linear of the base and, for each row of the batch, that row's own LoRA delta."""

    def __init__(
        self,
        site: Site,
        layer: int,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__()
        self.site, self.layer = site, layer
        self.base = Linear(site, dtype, bias=bias, scheme=scheme)

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""
        lora, side = batch.lora.get(self.site.name), batch.side
        if lora is None:
            y: Tensor = self.base(x, batch.batch_invariant)
            return y
        a, b = lora.pool.layer(self.layer)
        table = lora.scales.table(lora.table, self.layer)
        if side is not None:
            with side.fork():
                planes = mk.lora_shrink(x, a, table, lora.tiles, mk.lora_splits(x, a))
        y = self.base(x, batch.batch_invariant)
        if lora.rows is not None:
            mk.lora_columns_(y, x, lora.rows.columns, lora.tiles)
        if side is None:
            mk.lora_(y, x, a, b, table, lora.tiles, lora.slice_starts)
        else:
            side.join()
            mk.lora_expand_(y, planes, b, table, lora.tiles, lora.slice_starts)
        return y

    def part(self) -> Part:
        """What loads the base's weight."""
        slices = range(len(self.site.slices))
        return self.base.part([self.site.module_path(self.layer, i) for i in slices])


class LoraEmbedding(nn.Module):
    """The base's embedding and, for each row of the batch, that row's own LoRA delta."""

    def __init__(self, vocab: int, hidden: int, dtype: torch.dtype, tied: Linear | None) -> None:
        """`tied` is the head whose rows are the embedding's: it is loaded as the embedding."""
        super().__init__()
        self.tied = tied
        self.weight = _parameter(0 if tied is not None else vocab, hidden, dtype=dtype)
        self.dtype = dtype

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The batch's ids, int64 [tokens] -> [tokens, hidden]."""
        ids, lora = batch.ids, batch.lora.get("embed")
        y = self.weight[ids] if self.tied is None else self.tied.rows(ids, self.dtype)
        if lora is not None:
            if lora.rows is not None:
                assert batch.token_slots is not None, "trained rows would be ignored"
                lora.rows.add_(y, ids, batch.token_slots)
            a, b = lora.pool.layer(0)
            mk.lora_embed_(y, ids, a, b, lora.scales.table(lora.table, 0), lora.tiles)
        return y

    def part(self) -> Part:
        """What loads the base's weight."""
        path = "model.embed_tokens"
        if self.tied is not None:
            return self.tied.part([path])
        return fill({f"{path}.weight": self.weight})


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
