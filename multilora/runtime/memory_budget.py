"""Whether an engine fits, and how many KV blocks: said before it is loaded, and counted after."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.engine import EngineConfig
    from ..device.cpu import DeviceMemory
    from .memory_needs import MemoryNeeds

logger = logging.getLogger(__name__)

SITES, PAGE_ROWS = 6, 8  # of a Llama; of a rank page
DEFAULT_KV_BYTES = 4 << 30
"""KV memory on a CPU when num_kv_blocks is not given and full-length requests would need more."""


def check_device(config: EngineConfig, needs: MemoryNeeds, memory: DeviceMemory) -> None:
    """Raises ConfigError if the least that the engine needs of a GPU is more than it may take.

    `memory` is that before anything is loaded.
    """
    blocks_that_fit(config, needs, memory, memory.total - memory.free)


def check_host(config: EngineConfig, needs: MemoryNeeds, memory: DeviceMemory) -> None:
    """Raises ConfigError for what a machine cannot hold; warns for weights if little is free now.

    That is no more than a warning, since the system may free some, and a container's limit may be
    another one than was found.
    """
    cure = "set quantization='int8' or 'int4', or use a machine with more memory"
    if config.quantization is not None:
        cure = "use a machine with more memory"
    weights = f"the weights of {config.model} need {_gb(needs.base)}"
    if needs.base > memory.total:
        raise ConfigError(f"{weights}, and this machine has {_gb(memory.total)}; {cure}")
    if (kv := (config.num_kv_blocks or 0) * needs.block) > memory.total:
        raise ConfigError(
            f"{config.num_kv_blocks} KV blocks need {_gb(kv)}, and this machine has "
            f"{_gb(memory.total)}; lower num_kv_blocks"
        )
    if (tables := _table_bytes(config, needs)) > memory.total:
        raise ConfigError(
            f"the tables of max_num_seqs={config.max_num_seqs} requests and of max_loras="
            f"{config.max_loras} slots of max_lora_rank={config.max_lora_rank} need "
            f"{_gb(tables)}, and this machine has {_gb(memory.total)}; lower these"
        )
    if needs.base > memory.free:
        logger.warning(
            "%s, and %s are free here: the system may end the process; %s",
            weights,
            _gb(memory.free),
            cure,
        )


def _table_bytes(config: EngineConfig, needs: MemoryNeeds) -> int:
    """Bytes of what says where things are: tokens and blocks of requests, pages of slots."""
    requests = needs.max_blocks * (4 * config.block_size + 3 * 4)  # its own, sent, of graphs
    return requests + SITES * config.max_loras * config.max_lora_rank // PAGE_ROWS * 8


def num_blocks(config: EngineConfig, needs: MemoryNeeds, memory: DeviceMemory | None) -> int:
    """The number of KV blocks; `memory` as it is when only the weights are loaded.

    Without a GPU (None) memory is virtual: as many as full requests need, at most 4 GiB of them.
    """
    if memory is None:
        affordable = DEFAULT_KV_BYTES // needs.block
        found = config.num_kv_blocks or max(min(needs.max_blocks, affordable), 1)
    else:
        others = max(memory.total - memory.free - needs.base, 0)
        fits = blocks_that_fit(config, needs, memory, others)
        found = config.num_kv_blocks or min(fits, needs.max_blocks)
    logger.info(
        "memory: base %s, activations %s, rank pages %s, graphs %s, %d KV blocks of %d tokens %s",
        *map(_gb, (needs.base, needs.activations, needs.rank_pages, needs.graphs)),
        found,
        config.block_size,
        _gb(found * needs.block),
    )
    return found


def host_blocks(needs: MemoryNeeds, memory: DeviceMemory) -> int:
    """KV blocks that the free memory of a host holds beside all else."""
    return max((memory.free - needs.fixed) // needs.block, 0)


def ran_out(
    config: EngineConfig, needs: MemoryNeeds, memory: DeviceMemory, error: Exception
) -> ConfigError:
    """What to raise for an allocation that failed while the engine was made.

    `memory` is that before anything was loaded.
    """
    return ConfigError(
        f"the GPU's memory ran out ({str(error).partition('. ')[0]}). "
        f"{_account(config, needs, memory, memory.total - memory.free)}. See whether another "
        "process takes memory meanwhile; set enforce_eager=True, or lower gpu_memory_utilization, "
        "max_num_seqs or max_num_batched_tokens"
    )


def blocks_that_fit(
    config: EngineConfig, needs: MemoryNeeds, memory: DeviceMemory, others: int
) -> int:
    """KV blocks on a GPU beside all else and `others`, bytes of other processes and the driver.

    ConfigError if they are fewer than the least number.
    """
    room = _room(config, memory, others)
    fits = (room - needs.fixed) // needs.block
    if fits >= needs.min_blocks:
        return fits
    account = _account(config, needs, memory, others)
    if needs.base > room:
        share = "raise gpu_memory_utilization, " if needs.base < memory.total - others else ""
        raise ConfigError(
            f"{account}. The weights alone do not fit: {share}use a GPU with more memory, a "
            "narrower dtype, or device='cpu' with quantization='int8' or 'int4'"
        )
    lower = "lora_pages, max_num_batched_tokens, max_num_seqs or max_lora_rank"
    if fits >= 1 and config.num_kv_blocks is not None:
        lower = f"num_kv_blocks to {fits}, or {lower}"
    elif fits >= 1:
        lower = f"max_model_len to {fits * config.block_size}, or {lower}"
    raise ConfigError(f"{account}. Lower {lower}, or raise gpu_memory_utilization")


def _room(config: EngineConfig, memory: DeviceMemory, others: int) -> int:
    return int(memory.total * config.gpu_memory_utilization) - others


def _account(config: EngineConfig, needs: MemoryNeeds, memory: DeviceMemory, others: int) -> str:
    """What is needed and what is there, number by number with the setting that decides it."""
    kv, seqs = needs.min_blocks * needs.block, f"max_num_seqs={config.max_num_seqs}"
    why = "num_kv_blocks" if config.num_kv_blocks else "one request of max_model_len"
    length = needs.min_blocks * config.block_size
    return (
        f"{config.model} needs {_gb(needs.fixed + kv)} of the GPU: "
        f"weights {_gb(needs.base)}, "
        f"rank pages {_gb(needs.rank_pages)} (lora_pages={config.pages_per_site(is_gpu=True)}), "
        f"KV blocks {_gb(kv)} ({needs.min_blocks} for {length} tokens: {why}), "
        f"activations {_gb(needs.activations)} "
        f"(max_num_batched_tokens={config.max_num_batched_tokens}, {seqs}, "
        f"max_lora_rank={config.max_lora_rank}), "
        f"graphs {_gb(needs.graphs)} ({seqs}); it may take "
        f"{_gb(max(_room(config, memory, others), 0))}: {_gb(memory.total)} x "
        f"gpu_memory_utilization={config.gpu_memory_utilization}, less {_gb(others)} in use"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
