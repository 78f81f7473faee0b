"""`multilora info`: what a model needs of memory and what fits, from its config.json alone."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ...config.engine import QUANTIZATIONS, EngineConfig
from ...config.model import DTYPES
from ...config.presets import shape_of
from ...config.quantization import schemes_of
from ...errors import ConfigError
from . import options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...config.model import ModelConfig
    from ...device.cpu import DeviceMemory
    from ...engine.builder import Reckoned

SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?(?:([KMGT])(i?)B|B?)")
SETTINGS = (
    *("dtype", "quantization", "quantization_group_size", "kv_cache_dtype", "device"),
    *("max_model_len", "max_num_seqs", "max_loras", "max_lora_rank", "lora_pages"),
    *("num_kv_blocks", "gpu_memory_utilization"),
)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    value: int
    note: str = ""
    is_bytes: bool = True

    def __str__(self) -> str:
        size = f"bytes {_short(self.value):>10}" if self.is_bytes else ""
        return f"{self.name:<38}{self.value:>16,} {size:<17} {self.note}".rstrip()


class Machine(NamedTuple):
    """Where the model is to run."""

    is_gpu: bool
    memory: DeviceMemory


def info(
    model: Annotated[str, typer.Argument(help="Folder with a config.json, or llama-3.1-8b, ...")],
    device: options.Device = "cpu",
    memory: Annotated[
        str | None, typer.Option(help="Of a machine that is not here: 80GiB, 64GB.")
    ] = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    quantization_group_size: options.GroupSize = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    num_kv_blocks: options.NumKVBlocks = None,
    max_loras: options.MaxLoras = None,
    max_lora_rank: options.MaxLoraRank = None,
    lora_rank: Annotated[int, typer.Option(help="Of an adapter of every linear.")] = 16,
    lora_pages: options.LoraPages = None,
    gpu_memory_utilization: options.MemoryShare = None,
) -> None:
    """Says what a model needs of memory and what fits; no weights are read.

    Exit status 1, with the reason, for what a machine cannot hold.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    settings = {name: given[name] for name in SETTINGS if name in given}
    config, shape = EngineConfig(model=model, **settings), shape_of(model)
    if not 1 <= lora_rank <= config.max_lora_rank:
        raise ConfigError(
            f"--lora-rank must be from 1 to max_lora_rank {config.max_lora_rank}, not {lora_rank}"
        )
    known, machine = _open(config, shape, None if memory is None else parse_size(memory))
    rows = chain(
        _of_model(config, shape, known, machine.is_gpu),
        _of_loras(shape, known, lora_rank),
        _of_machine(config, known, machine, lora_rank),
    )
    for row in rows:
        print(row)


def parse_size(text: str, name: str = "--memory", least: int = 1) -> int:
    """Bytes from "80GiB", "64 GB" or a plain number."""
    match = SIZE.fullmatch(text.strip())
    size = -1
    if match is not None:
        number, prefix, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix or " ")))
    if size < least:
        raise ConfigError(f"{name} must be a size like 80GiB or 64GB, not {text!r}")
    return size


def _open(config: EngineConfig, shape: ModelConfig, size: int | None) -> tuple[Reckoned, Machine]:
    """What is reckoned, and the machine: this one, or one with so much memory."""
    from ...device.capabilities import check_capabilities, check_settings
    from ...device.cpu import Device, DeviceMemory, host_memory
    from ...device.cuda import CudaDevice
    from ...device.select import open_device
    from ...engine.builder import reckon

    if size is not None:
        kind = CudaDevice if config.device.startswith("cuda") else Device
        check_settings(config, shape, is_gpu=kind.is_cuda)
        return reckon(config, kind, shape), Machine(kind.is_cuda, DeviceMemory(size, size))
    try:
        device = open_device(config.device)
    except ConfigError as error:
        raise ConfigError(f"{error}; or say how large it is: --memory 80GiB") from None
    check_capabilities(device, config, shape)
    found = device.memory() or host_memory()
    if found is None:
        raise ConfigError("this machine does not say how much memory it has; give --memory 64GB")
    return reckon(config, device, shape), Machine(device.is_cuda, found)


def _of_model(
    config: EngineConfig, shape: ModelConfig, known: Reckoned, is_gpu: bool
) -> Iterator[Row]:
    """The base in each form that it can be loaded in, and its KV."""
    import torch

    from ...runtime.memory_needs import weight_bytes

    yield Row("parameters", weight_bytes(shape, torch.int8, {}), is_bytes=False)  # a byte each
    model = _name(known.dtypes.model)
    chosen = config.quantization or model
    for name in DTYPES:
        size = weight_bytes(shape, getattr(torch, name), {})
        yield Row(f"base in {name}", size, note="chosen" if name == chosen else "")
    for name in QUANTIZATIONS:
        group = config.quantization_group_size if name == chosen else None
        schemes = schemes_of(replace(config, quantization=name, quantization_group_size=group))
        note = "chosen" if name == chosen else "on a CPU only" if is_gpu else ""
        size = weight_bytes(shape, known.dtypes.model, schemes)
        yield Row(f"base in {name}, the rest in {model}", size, note=note)
    needs, length = known.needs, known.max_model_len
    yield Row("KV of a token", needs.block // config.block_size, note=_name(known.dtypes.kv))
    yield Row(f"KV of {length:,} tokens", _blocks(config, length) * needs.block, note="a request")


def _of_loras(shape: ModelConfig, known: Reckoned, rank: int) -> Iterator[Row]:
    """What adapters take, and the rest that is no weight and no KV."""
    from multilora_kernels import pages_for

    from ...runtime.memory_needs import page_bytes

    page, needs = page_bytes(shape, known.dtypes.lora), known.needs
    yield Row(
        f"rank pages of an adapter of rank {rank}",
        pages_for(rank) * page,
        note=f"{pages_for(rank)} at each linear of a layer, in {_name(known.dtypes.lora)}",
    )
    yield Row(
        "rank pages", needs.rank_pages, note=f"{needs.rank_pages // page} at each, lora_pages"
    )
    yield Row("activations", needs.activations, note="of the largest step")
    if needs.graphs:
        yield Row("graphs", needs.graphs, note="of decode steps")
    yield Row("all but KV", needs.fixed)


def _of_machine(
    config: EngineConfig, known: Reckoned, machine: Machine, rank: int
) -> Iterator[Row]:
    """What the machine holds; ConfigError if that is too little."""
    from multilora_kernels import pages_for

    from ...runtime.memory_budget import blocks_that_fit, check_host, host_blocks, num_blocks

    needs, length = known.needs, known.max_model_len
    each, (is_gpu, memory) = _blocks(config, length), machine
    if is_gpu:
        blocks = blocks_that_fit(config, needs, memory, memory.total - memory.free)
    else:
        check_host(config, needs, memory)
        blocks = host_blocks(needs, memory)
    yield Row("memory", memory.total, note=f"of which {_short(memory.free)} are free")
    fit = min(config.num_kv_blocks or blocks, blocks) // each
    count, notes = min(fit, config.max_num_seqs), list[str]()
    if fit > count:
        notes.append(f"max_num_seqs; there is room for {fit:,}")
    if not count:
        notes.append(
            f"there is room for {blocks * config.block_size:,} tokens: lower max_model_len"
            if blocks
            else "all but KV is more than is free: lower lora_pages, or quantise the base"
        )
    if not is_gpu and (usual := num_blocks(config, needs, None) // each) < count:
        notes.append(f"{usual} unless num_kv_blocks={count * each}")
    yield Row(f"requests of {length:,} tokens at once", count, "; ".join(notes), is_bytes=False)
    pages = config.pages_per_site(is_gpu)
    adapters = min(config.max_loras, pages // pages_for(rank))
    note = "max_loras" if adapters == config.max_loras else f"{pages} at each linear: lora_pages"
    yield Row(f"adapters of rank {rank} resident", adapters, note, is_bytes=False)


def _blocks(config: EngineConfig, length: int) -> int:
    return math.ceil(length / config.block_size)


def _short(size: int) -> str:
    thousands = min((len(str(size)) - 1) // 3, 3)
    return f"{size / 1000**thousands:.2f} {('B', 'kB', 'MB', 'GB')[thousands]}"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
