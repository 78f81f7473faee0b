"""The parts of a Llama: fused linears that know their LoRA site, norm, rotary, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import multilora_kernels as mk

from ..checkpoint.parts import Part
from ..config.lora_sites import Site
from ..config.model import ModelConfig
from ..config.quantization import Scheme
from ..errors import CheckpointError
from .forward_batch import ForwardBatch
from .kv_cache import KVCache


class Linear(nn.Module):
    """A fused linear and, for each row of the batch, that row's own LoRA delta.

    Its weight is [0, in] until its part is loaded. Then it is a plain tensor, or packed where that
    is faster, or quantised.
    """

    weight: Tensor | mk.PackedWeight

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
        self.site, self.layer, self.scheme = site, layer, scheme
        self.weight = torch.empty(0, site.in_, dtype=dtype)
        self.bias = _parameter(site.out, dtype=dtype) if bias else None

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""

        def base() -> Tensor:
            return mk.linear(x, self.weight, self.bias, batch_invariant=batch.batch_invariant)

        return batch.adapt(self.site.name, self.layer, x, base)

    def part(self, *paths: str) -> Part:
        """What loads it; `paths` are those of its slices in the checkpoint, if not the site's."""
        site, slices = self.site, range(len(self.site.slices))
        modules = paths or tuple(site.module_path(self.layer, i) for i in slices)
        shapes: dict[str, tuple[int, ...]] = {}
        for path, part in zip(modules, site.slices, strict=True):
            shapes[f"{path}.weight"] = (part.out, site.in_)
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
        return self.weight[ids]

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


class RMSNorm(nn.Module):
    """RMS norm; with a residual it adds into it first and normalises the sum."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = _parameter(size, dtype=dtype), eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x and residual [tokens, hidden]; residual changes in place."""
        return mk.rms_norm(x, self.weight, self.eps, residual)


class Rope:
    """cos and sin of every position seen so far, float32 [positions, head_dim / 2] each.

    Grows by whole steps computed in one shape, so that a position's bits never depend on when it
    was asked for; on the CPU, so that they do not depend on the device either.
    """

    STEP = 4096

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        even = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu")
        self.inv_freq = _scale_frequencies(
            1.0 / config.rope_theta ** (even.float() / config.head_dim), config
        )
        self.cos = self.sin = torch.empty(0, config.head_dim // 2, device=device)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin that cover at least `length` positions."""
        if len(self.cos) < length:
            steps = [
                torch.arange(first, first + self.STEP, device="cpu").float()[:, None]
                * self.inv_freq
                for first in range(len(self.cos), length, self.STEP)
            ]
            device = self.cos.device
            self.cos = torch.cat((self.cos, *(angles.cos().to(device) for angles in steps)))
            self.sin = torch.cat((self.sin, *(angles.sin().to(device) for angles in steps)))
        return self.cos, self.sin


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(
        self,
        config: ModelConfig,
        sites: dict[str, Site],
        layer: int,
        dtype: torch.dtype,
        schemes: Mapping[str, Scheme],
    ) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.qkv, self.o = (
            Linear(sites[n], layer, dtype, bias=config.attention_bias, scheme=schemes.get(n))
            for n in ("qkv", "o")
        )
        self.scale = 1.0 / math.sqrt(config.head_dim)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache, rope: Rope) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; stores this step's K and V."""
        dim = self.config.head_dim
        fused = self.qkv(x, batch).view(len(x), -1, dim)
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
        pages = cache.layer(self.layer)
        cos, sin = rope.tables(batch.max_seq_len)
        mk.rope_store_kv_(q, k, v, cos, sin, batch.positions, batch.kv_slots, *pages)
        out = mk.paged_attention(
            q,
            pages.k,
            pages.v,
            batch.block_table,
            batch.seq_lens,
            batch.query_starts,
            scale=self.scale,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            batch_invariant=batch.batch_invariant,
        )
        out_x: Tensor = self.o(out.view(len(x), -1), batch)
        return out_x


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(
        self,
        config: ModelConfig,
        sites: dict[str, Site],
        layer: int,
        dtype: torch.dtype,
        schemes: Mapping[str, Scheme],
    ) -> None:
        super().__init__()
        self.gate_up, self.down = (
            Linear(sites[n], layer, dtype, bias=config.mlp_bias, scheme=schemes.get(n))
            for n in ("gate_up", "down")
        )

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        y: Tensor = self.down(mk.silu_mul(self.gate_up(x, batch)), batch)
        return y


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def _scale_frequencies(inv_freq: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3.1's rule: stretches long waves by `factor`, keeps short ones, blends between."""
    s = config.rope_scaling
    if s is None:
        return inv_freq
    turns = (
        s.original_max_position_embeddings * inv_freq / (2 * math.pi)
    )  # over the original context
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / s.factor + blend * inv_freq
