"""What an engine needs of a device's memory, reckoned from shapes and settings before it is loaded.

Reckoned from below: tensors that must be there at one time, without what an allocator loses beside
them, so that nothing is refused that would fit. What was loaded and can be measured takes the place
of these numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..adapters.output_scales import ScaleRows
from ..adapters.rank_pages import RankPagePool
from ..adapters.weight_changes import NormChanges
from ..config.lora_sites import biased_sites, num_norms, sites_of
from ..config.quantization import schemes_of
from ..model.kv_cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ..config.engine import EngineConfig
    from ..config.lora_sites import Site
    from ..config.model import ModelConfig
    from ..config.quantization import Scheme

WORKSPACE_BYTES = 32 << 20
"""What cuBLAS keeps for a stream, on Hopper; other GPUs keep less."""
LAYER_BYTES = 256 << 10
"""What the driver keeps of a layer of a captured graph; a guess, 8 MiB for a graph of 32 layers."""
SAMPLER_BYTES = 28
"""Of each logit that is drawn from: a copy in fp32, that sorted, its places, and both once more."""
PLANES = 8
"""Parts of K that LoRA's shrink sums apart, by the launch plans; of `down` they are 16."""
SPLIT_ROWS = 16
"""Query rows, over the heads that share KV, up to which attention is split over KV."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes that an engine needs, and what they are for."""

    base: int  # the weights
    activations: int  # of the largest step
    rank_pages: int  # of the sites in layers, all of them, and the slots' scales
    graphs: int  # captured ones
    block: int  # one KV block
    min_blocks: int  # num_kv_blocks, or those of one request of full length
    max_blocks: int  # that full-length requests in every row could use

    @property
    def fixed(self) -> int:
        """All but KV blocks."""
        return self.base + self.activations + self.rank_pages + self.graphs


class Dtypes(NamedTuple):
    """Of what lies in memory."""

    model: torch.dtype
    lora: torch.dtype
    kv: torch.dtype


def expected(
    config: EngineConfig,
    shape: ModelConfig,
    dtypes: Dtypes,
    max_model_len: int,
    rank_pages: int,  # of each site
    graphs: Sequence[int],  # tokens of each graph that is captured at the start
    *,
    has_scales: bool = False,  # whether the scales of all slots are there from the start
) -> MemoryNeeds:
    """The needs of an engine of this shape, as far as they are known before it is loaded."""
    size, blocks = dtypes.model.itemsize, -(-max_model_len // config.block_size)
    tokens = min(config.max_num_batched_tokens, config.max_num_seqs * max_model_len)
    sampled = config.max_num_seqs * shape.vocab_size * (size + SAMPLER_BYTES)
    queries = max(SPLIT_ROWS * shape.num_kv_heads // shape.num_heads, 1)
    seqs, rank = config.max_num_seqs, config.max_lora_rank
    step = step_bytes(shape, tokens, (seqs, queries, max_model_len), size, rank)
    return MemoryNeeds(
        base=weight_bytes(shape, dtypes.model, schemes_of(config)),
        activations=max(step, sampled),
        rank_pages=rank_pages * page_bytes(shape, dtypes.lora)
        + has_scales * scale_bytes(shape, config.max_loras),
        graphs=graph_bytes(shape, graphs, max_model_len, size, rank) if graphs else 0,
        block=KVCache.block_bytes(shape, config.block_size, dtypes.kv),
        min_blocks=config.num_kv_blocks or blocks,
        max_blocks=config.max_num_seqs * blocks,
    )


def weight_bytes(shape: ModelConfig, dtype: torch.dtype, schemes: Mapping[str, Scheme]) -> int:
    """Bytes of a base's weights, those with a scheme quantised: codes and fp32 scales."""
    linears = {name: site for name, site in sites_of(shape).items() if name != "embed"}
    biases = sum(site.out for site in biased_sites(shape))
    vectors = shape.num_layers * (2 * shape.hidden_size + biases)
    embedding = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return sum(
        site.layers * _linear_bytes(site, dtype, schemes.get(name))
        for name, site in linears.items()
    ) + dtype.itemsize * (embedding + vectors + shape.hidden_size)


def _linear_bytes(site: Site, dtype: torch.dtype, scheme: Scheme | None) -> int:
    if scheme is None:
        return site.out * site.in_ * dtype.itemsize
    groups = -(-site.in_ // (scheme.group or site.in_))
    return site.out * (-(-site.in_ * scheme.bits // 8) + 4 * groups)


def page_bytes(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one rank page at each site in layers."""
    sites = [site for site in sites_of(shape).values() if site.in_layers]
    return sum(RankPagePool(site, 1, dtype=dtype).page_bytes for site in sites)


def scale_bytes(shape: ModelConfig, slots: int) -> int:
    """Bytes of the scales and biases of all slots, at every site, and of their norms."""
    sites = sites_of(shape)
    norms = NormChanges(num_norms(sites), slots, shape.hidden_size)
    scales = sum(ScaleRows(site, slots).capacity_bytes for site in sites.values())
    return scales + norms.capacity_bytes


def step_bytes(
    shape: ModelConfig,
    tokens: int,
    attended: tuple[int, int, int],  # sequences, queries of each that are split, their tokens
    itemsize: int,
    rank: int,  # that LoRA's planes have room for
) -> int:
    """Bytes of a step inside of the layers: where it is widest, with LoRA at every site.

    Two rows of hidden values (the running sum, a linear's input), and the larger of: a linear's
    output with LoRA's planes, fp32 [PLANES, tokens, slices x rank]; attention's input, output and
    segments, fp32 [segments, sequences, queries, heads x head_dim].
    """
    sites = [site for site in sites_of(shape).values() if site.in_layers]
    linear = max(site.out * itemsize + PLANES * len(site.slices) * rank * 4 for site in sites)
    heads = shape.num_heads * shape.head_dim
    fused = heads + 2 * shape.num_kv_heads * shape.head_dim
    seqs, queries, length = attended
    split = _segments(length) * seqs * queries * heads * 4
    attention = tokens * (fused + heads) * itemsize + split
    return 2 * tokens * shape.hidden_size * itemsize + max(tokens * linear, attention)


def _segments(length: int) -> int:
    """Of kernels/cuda/attention_segments.py: 16 of 512 tokens, 16 more, then twice as long ones."""
    if length <= 8192:
        return -(-length // 512)
    return int(16 * math.log2(length / 4096))


def graph_bytes(
    shape: ModelConfig, tokens: Sequence[int], max_model_len: int, itemsize: int, rank: int
) -> int:
    """Bytes that captured graphs keep, by the tokens of each.

    `logits + max(step, logits) + WORKSPACE_BYTES + graphs x layers x LAYER_BYTES`: the logits that
    all write to, [most tokens, vocab]; the memory that they share while they run, in which logits
    come last; cuBLAS's workspace for the stream of captures; what the driver keeps of each.
    """
    most = max(tokens)
    logits = most * shape.vocab_size * itemsize
    step = step_bytes(shape, most, (most, 1, max_model_len), itemsize, rank)
    driver = len(tokens) * shape.num_layers * LAYER_BYTES
    return logits + max(step, logits) + WORKSPACE_BYTES + driver
