"""How many KV blocks fit beside the weights and the rank pages; said once, at start-up."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.engine import EngineConfig
    from ..device.cpu import DeviceMemory

logger = logging.getLogger(__name__)

DEFAULT_KV_BYTES = 4 << 30
"""KV memory on a CPU when num_kv_blocks is not given and full-length requests would need more."""
GRAPH_BYTES = 1 << 30
"""Left free for captured graphs and what the driver takes for them."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes that an engine needs, and what they are for."""

    base: int  # the weights
    activations: int  # of the largest step
    rank_pages: int  # of the sites in layers, all of them
    block: int  # one KV block
    max_blocks: int  # that full-length requests in every row could use


def num_blocks(config: EngineConfig, needs: MemoryNeeds, memory: DeviceMemory | None) -> int:
    """The number of KV blocks; `memory` as it is when only the weights are loaded.

    Without a GPU (None) memory is virtual: as many as full requests need, at most 4 GiB of them.
    """
    if memory is None:
        affordable = DEFAULT_KV_BYTES // needs.block
        found = config.num_kv_blocks or max(min(needs.max_blocks, affordable), 1)
        _say(config, needs, found)
        return found
    graphs = 0 if config.enforce_eager else GRAPH_BYTES
    budget = int(memory.total * config.gpu_memory_utilization)
    used = memory.total - memory.free  # the weights, and what others hold
    room = budget - used - needs.activations - needs.rank_pages - graphs
    fits = room // needs.block
    wanted = config.num_kv_blocks or min(fits, needs.max_blocks)
    if wanted < 1 or wanted > fits:
        raise ConfigError(
            f"{max(wanted, 1)} KV blocks need {_gb(max(wanted, 1) * needs.block)}, but of "
            f"{_gb(memory.total)} x gpu_memory_utilization {config.gpu_memory_utilization} only "
            f"{_gb(max(room, 0))} are left beside {_gb(used)} in use (weights {_gb(needs.base)}), "
            f"{_gb(needs.activations)} of activations, {_gb(needs.rank_pages)} of rank pages and "
            f"{_gb(graphs)} for graphs; lower lora_pages, max_loras, max_num_batched_tokens or "
            "num_kv_blocks, or raise gpu_memory_utilization"
        )
    _say(config, needs, wanted)
    return wanted


def _say(config: EngineConfig, needs: MemoryNeeds, blocks: int) -> None:
    logger.info(
        "memory: base %s, activations %s, rank pages %s, %d KV blocks of %d tokens %s",
        _gb(needs.base),
        _gb(needs.activations),
        _gb(needs.rank_pages),
        blocks,
        config.block_size,
        _gb(blocks * needs.block),
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
