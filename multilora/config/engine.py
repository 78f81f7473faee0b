"""Everything about how a model is served."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError
from .model import DTYPES

QUANTIZATIONS = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "int8")
LOAD_FORMATS = ("auto", "dummy")
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything about how a model is served. Names and defaults are vLLM's where it has one."""

    model: str  # folder of the base checkpoint
    tokenizer: str | None = None  # folder of the tokenizer; None = the model's
    skip_tokenizer_init: bool = False  # serve token ids only
    split_special_tokens: bool = False  # True = special tokens in text prompts are plain text
    load_format: str = "auto"  # "dummy" = random weights; `model` may then be a shape's name
    device: str = "cpu"  # "cuda", "cuda:1", or "auto" = a GPU if there is one
    dtype: str = "auto"  # "auto" = the checkpoint's own
    quantization: str | None = None  # of the base's linears, when loaded: "int8" or "int4"
    quantization_group_size: int | None = None  # columns that share a scale; None: all, int4: 32
    seed: int = 0  # of requests that set none

    max_model_len: int | None = None  # prompt + output tokens; None = the model's own limit
    block_size: int = 16  # tokens in a KV block
    kv_cache_dtype: str = "auto"  # "auto" = the model's; "int8" on a CPU, "fp8" (e4m3) on a GPU
    num_kv_blocks: int | None = None  # None = enough for max_num_seqs full requests or 4 GiB
    max_num_seqs: int = 64  # requests that run at once
    max_num_batched_tokens: int = 512  # tokens in one step: the prefill chunk
    enable_prefix_caching: bool = True

    max_loras: int = 16  # mixes resident at once: slots of the adapter table
    max_lora_rank: int = 512  # largest rank of one mix at one site
    lora_pages: int | None = None  # rank pages (8 rows) per site; None = 8 a slot, 4 on a GPU
    lora_dtype: str = "auto"  # of the rank pages; "auto" = the model's dtype
    policy: str = "fcfs"  # order of the waiting requests

    gpu_memory_utilization: float = 0.9  # share of a GPU's memory for all of this
    enforce_eager: bool = False  # True = no captured decode steps
    async_scheduling: bool | None = None  # prepare a step while the last one runs; None = on a GPU
    overlap_lora: bool | None = None  # LoRA's first half beside the base's work; None = on a GPU
    batch_invariant: bool = False  # on a GPU too, no row's bits depend on its neighbours

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_loras",
            "max_lora_rank",
        ):
            _positive(name, getattr(self, name))
        for name in ("max_model_len", "num_kv_blocks", "lora_pages"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("dtype", "lora_dtype"):
            if getattr(self, name) not in ("auto", *DTYPES):
                raise ConfigError(
                    f"{name} must be one of auto, {', '.join(DTYPES)}, not {getattr(self, name)!r}"
                )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, not "
                f"{self.kv_cache_dtype!r}"
            )
        self._check_quantization()
        if self.max_lora_rank % 8:
            raise ConfigError(f"max_lora_rank must be a multiple of 8, not {self.max_lora_rank}")
        if not DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device must be cpu, cuda, cuda:N or auto, not {self.device!r}; "
                "use device='cpu' on a machine without an NVIDIA GPU"
            )
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(
                f"load_format must be one of {', '.join(LOAD_FORMATS)}, not {self.load_format!r}"
            )
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be above 0, at most 1, not {share!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed must be an integer, not {self.seed!r}")

    def _check_quantization(self) -> None:
        kind, group = self.quantization, self.quantization_group_size
        if kind is not None and kind not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization must be None, {' or '.join(QUANTIZATIONS)}, not {kind!r}"
            )
        if group is None:
            return
        if isinstance(group, bool) or group not in GROUP_SIZES:
            raise ConfigError(
                f"quantization_group_size must be None or one of {GROUP_SIZES}, not {group!r}"
            )
        if kind is None:
            raise ConfigError(
                f"quantization_group_size={group} needs quantization='int8' or 'int4'"
            )

    def pages_per_site(self, is_gpu: bool) -> int:
        """Rank pages of each site: `lora_pages`, or rank 64 for each slot, on a GPU rank 32.

        A CPU's memory is taken by pages that are written to, a GPU's by all of them at the start:
        5.4 GB of the 8B shape and 26.5 GB of the 70B one would be much for what most adapters need.
        """
        return self.lora_pages or self.max_loras * (4 if is_gpu else 8)

    def is_async(self, is_gpu: bool) -> bool:
        """Whether a step is prepared while the one before it runs."""
        return is_gpu if self.async_scheduling is None else self.async_scheduling

    def overlaps(self, is_gpu: bool) -> bool:
        """Whether LoRA's shrink runs beside the base's work."""
        return is_gpu if self.overlap_lora is None else self.overlap_lora

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Like the constructor, but an unknown name is a ConfigError that lists the known ones."""
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; known settings: {', '.join(known)}")
        return cls(**kwargs)


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}")
