"""From settings to what an engine works with: device, loaded model, memory, runner."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..adapters.store import AdapterStore
from ..checkpoint.random_weights import load_random
from ..checkpoint.reader import load_checkpoint, read_config
from ..config.engine import EngineConfig
from ..config.lora_sites import sites_of
from ..config.model import ModelConfig
from ..config.presets import SHAPES, shape_of
from ..config.quantization import schemes_of
from ..device.capabilities import check_capabilities
from ..device.cpu import Device, host_memory
from ..device.select import open_device
from ..errors import ConfigError
from ..model.families import MODELS
from ..model.kv_cache import DTYPES, KVCache
from ..model.kv_calibration import calibrate
from ..runtime.graph_runner import batch_shapes
from ..runtime.memory_budget import check_device, check_host, num_blocks, ran_out
from ..runtime.memory_needs import Dtypes, MemoryNeeds, expected
from ..runtime.model_runner import ModelRunner
from ..scheduling.block_pool import BlockPool
from ..scheduling.scheduler import Scheduler
from ..tokenization.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ..model.llama import Llama
    from ..tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of."""

    device: Device
    model_config: ModelConfig
    model: Llama
    tokenizer: Tokenizer | None
    store: AdapterStore
    runner: ModelRunner
    pool: BlockPool
    scheduler: Scheduler
    max_model_len: int
    needs: MemoryNeeds  # bytes, for `Engine.memory`
    end_ids: frozenset[int]  # that end an answer, unless a request ignores them
    clock: Callable[[], float] = time.monotonic  # of the metrics: no step depends on it
    wall_clock: Callable[[], float] = time.time  # seconds since 1970


def build(config: EngineConfig) -> EngineParts:
    """Loads everything; raises ConfigError, CheckpointError or TokenizerError if it cannot."""
    device = open_device(config.device)
    shape = shape_of(config.model) if _is_dummy(config) else read_config(config.model)
    check_capabilities(device, config, shape)
    (dtypes, length, needs), memory = reckon(config, device, shape), device.memory()
    if memory is not None:
        check_device(config, needs, memory)
    elif (host := host_memory()) is not None:
        check_host(config, needs, host)
    tokenizer = _tokenizer(config)
    try:
        model = _model(config, device, shape, dtypes.model)
        store = AdapterStore(
            sites_of(shape),
            config,
            dtype=dtypes.lora,
            device=device.torch,
            is_gpu=device.is_cuda,
        )
        with device.watch_compiler():
            runner, needs = _runner(config, device, model, store, length, dtypes.kv, needs)
    except torch.OutOfMemoryError as error:
        assert memory is not None, "a CPU raises MemoryError"
        raise ran_out(config, needs, memory, error) from error
    pool = BlockPool(runner.cache.num_blocks, config.block_size, config.enable_prefix_caching)
    return EngineParts(
        device=device,
        model_config=shape,
        model=model,
        tokenizer=tokenizer,
        store=store,
        runner=runner,
        pool=pool,
        scheduler=Scheduler(config, pool, store, length),
        max_model_len=length,
        needs=needs,
        end_ids=_end_ids(shape, tokenizer),
    )


def _end_ids(shape: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The model's and the tokenizer's; those that the model has no row for are said, once."""
    found = {*shape.eos_token_ids, *(() if tokenizer is None else tokenizer.eos_token_ids)}
    beyond = sorted(token for token in found if not 0 <= token < shape.vocab_size)
    if beyond:
        logger.warning(
            "the end tokens %s lie beyond the %d rows of the model, which cannot produce them: "
            "answers end at other end tokens, stop_token_ids or max_tokens only",
            beyond,
            shape.vocab_size,
        )
    return frozenset(found.difference(beyond))


class Reckoned(NamedTuple):
    """What is known of an engine before it is loaded."""

    dtypes: Dtypes
    max_model_len: int
    needs: MemoryNeeds


def reckon(config: EngineConfig, device: Device | type[Device], shape: ModelConfig) -> Reckoned:
    """What an engine of these settings is to be and needs; a kind of device is enough.

    A CPU captures on demand, and takes memory as it is touched.
    """
    dtypes, length = _dtypes(config, shape), _max_model_len(config, shape)
    sizes = batch_shapes(config.max_num_seqs, config.max_loras, length)
    beforehand = not config.enforce_eager and not device.captures_on_demand
    tokens = [size.tokens for size in sizes] if beforehand else []
    pages = config.pages_per_site(device.is_cuda)
    has_scales = device.is_cuda and config.has_lora_scales(is_gpu=True)
    needs = expected(config, shape, dtypes, length, pages, tokens, has_scales=has_scales)
    return Reckoned(dtypes, length, needs)


def _model(config: EngineConfig, device: Device, shape: ModelConfig, dtype: torch.dtype) -> Llama:
    with device.torch:
        model = MODELS["LlamaForCausalLM"](shape, dtype, schemes_of(config))
    if _is_dummy(config):
        load_random(model.parts(), config.seed, dtype, device.torch)
    else:
        load_checkpoint(config.model, model.parts(), shape)
    return model


def _runner(
    config: EngineConfig,
    device: Device,
    model: Llama,
    store: AdapterStore,
    max_model_len: int,
    kv_dtype: torch.dtype,
    needs: MemoryNeeds,  # as expected
) -> tuple[ModelRunner, MemoryNeeds]:
    """The runner with as many KV blocks as fit, its decode steps captured; needs as measured."""
    shape, size, scales = model.config, config.block_size, None
    if config.kv_cache_dtype in DTYPES:
        scales = calibrate(model, max_model_len, kv_dtype)

    def cache(blocks: int) -> KVCache:
        return KVCache(shape, blocks, size, kv_dtype, device.torch, scales)

    runner = ModelRunner(config, device, model, cache(1), store, sites_of(shape), max_model_len)
    memory = device.memory()
    if not device.captures_on_demand:
        store.reserve()  # what is counted is taken, and graphs keep the addresses
    needs = replace(
        needs,
        base=model.num_bytes,
        activations=0 if memory is None else device.peak_of(runner.profile_run),
        rank_pages=store.reserved_bytes,
    )
    runner.cache = cache(num_blocks(config, needs, memory))
    _make_ready(config, device, runner, needs)
    return runner, needs


def _make_ready(
    config: EngineConfig, device: Device, runner: ModelRunner, needs: MemoryNeeds
) -> None:
    """Compiles and captures what serving must not wait for. Says how long it took."""
    start = time.perf_counter()
    if not device.captures_on_demand:
        runner.warm_up()
    if not config.enforce_eager:
        runner.capture(needs.graphs)
    if not device.captures_on_demand:
        device.synchronize()
        logger.info(
            "compiled %d kernel variants or found them in Triton's cache, captured %d graphs in "
            "%.1f s",
            len(device.compilations.expected),
            len(runner.graphs or ()),
            time.perf_counter() - start,
        )


def _is_dummy(config: EngineConfig) -> bool:
    return config.load_format == "dummy"


def _dtypes(config: EngineConfig, shape: ModelConfig) -> Dtypes:
    """Of the weights, the rank pages and the KV blocks; "auto" is the model's own."""
    model: torch.dtype = getattr(torch, shape.dtype if config.dtype == "auto" else config.dtype)
    lora = model if config.lora_dtype == "auto" else getattr(torch, config.lora_dtype)
    return Dtypes(model, lora, DTYPES.get(config.kv_cache_dtype, model))


def _tokenizer(config: EngineConfig) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    if config.tokenizer is None and config.model.partition(":")[0] in SHAPES:
        raise ConfigError(
            f"{config.model!r} is a shape and has no tokenizer; give tokenizer=FOLDER, or "
            "skip_tokenizer_init=True to serve token ids"
        )
    return load_tokenizer(config.tokenizer or config.model)


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is beyond the {limit} positions that the model "
            "was made for"
        )
    return config.max_model_len or limit
