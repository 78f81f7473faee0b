"""Everything about how a model is served."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError, shown
from .model import DTYPES
from .vllm_settings import without_vllms

DTYPE_ALIASES = {"half": "float16", "float": "float32"}
QUANTIZATIONS = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "int8")
LOAD_FORMATS = ("auto", "dummy")
GENERATION_CONFIGS = ("auto", "vllm")
ALORA_MISSING = ("base", "error")
ADAPTER_CHAT_TEMPLATES = ("ignore", "use")
ADAPTER_SCHEMES = ("hf", "s3", "gs", "https", "http")
MOST = {
    "block_size": 2**16,
    "max_num_seqs": 2**16,
    "max_num_batched_tokens": 2**20,
    "max_loras": 2**16,
    "max_lora_rank": 2**16,
    "num_kv_blocks": 2**22,
    "lora_pages": 2**20,
    "max_model_len": 2**31,
    "max_host_adapter_bytes": 2**63,
    "adapter_cache_bytes": 2**63,
}
"""What the counts stay below: more than any machine serves, and less than tables of it can hurt."""
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything about how a model is served. Names are vLLM's where it has one.

    Settings that only vLLM has are accepted by `from_kwargs` (and so by `LLM`) while they ask for
    nothing, and otherwise are a ConfigError that says what to do instead. Defaults that differ from
    vLLM's are in docs/vllm.md, with the reason.

    Attributes:
        model: Folder of the base checkpoint.
        tokenizer: Folder of the tokenizer. None = the model's.
        skip_tokenizer_init: Serve token ids only.
        split_special_tokens: Whether special tokens in text prompts are plain text. False: they are
            what they are, as in vLLM.
        load_format: "auto", or "dummy" = random weights; `model` may then be a shape's name.
        device: "cpu", "cuda", "cuda:1", or "auto" = a GPU if there is one.
        dtype: Of weights and activations: "float32", "bfloat16", "float16", "half", "float" or a
            torch.dtype. "auto" = the checkpoint's own.
        quantization: Of the base's linears when they are loaded: "int8", "int4" or None.
        quantization_group_size: How many input columns share a scale, 32, 64 or 128. None = all
            for int8, 32 for int4.
        generation_config: Whether `LLM` samples by the model's own generation_config.json where it
            is given no SamplingParams: "auto" = it does, "vllm" = by SamplingParams().
        seed: Of the requests that set none.
        max_logprobs: Most log probabilities a place that a request may ask for. -1 = all.
        max_model_len: Prompt and output tokens of a request at most. None = the model's own limit.
        block_size: Tokens in a KV block.
        kv_cache_dtype: "auto" = the model's; "int8" on a CPU, "fp8" (e4m3) on a GPU.
        num_kv_blocks: Blocks of the KV cache, of `block_size` tokens each. None = enough for
            `max_num_seqs` full requests, or 4 GiB; on a GPU what is left of its memory.
        max_num_seqs: Requests that run at once.
        max_num_batched_tokens: Tokens in one step; prompts are taken in chunks of at most so many.
        enable_prefix_caching: Whether the KV of a prompt's beginning is used again by requests with
            the same beginning and the same adapters.
        max_loras: Mixes of adapters resident at once: slots of the adapter table.
        max_lora_rank: Largest rank of one mix at one site, a multiple of 8.
        lora_pages: Rank pages, of 8 rank rows each, at each site. None = 8 a slot, 4 on a GPU.
        lora_dtype: Of the rank pages. "auto" = the model's dtype.
        lora_scales: Whether adapters may have DoRA, biases or trained norms. None = on a CPU, where
            these take memory when the first one comes; on a GPU they take it at the start: 8 bytes
            for each output of a linear and slot.
        max_lora_token_rows: Rows of the embedding, and of the head, that one mix may change. They
            take memory when the first adapter with such rows comes, for all slots.
        max_host_adapter_bytes: Host memory above which registered adapters that nobody uses are
            dropped, to be read again. None = no bound.
        adapter_sources: Places that adapters may be fetched from, by their prefixes. As in
            ("hf://my-org/", "s3://bucket/"); empty = local folders only.
        adapter_cache_dir: Folder that keeps what was fetched, which processes may share. None =
            multilora/adapters in XDG_CACHE_HOME or ~/.cache.
        adapter_cache_bytes: Size of that folder, above which what was not used for longest goes.
            None = no bound.
        alora_missing: Who answers a prompt without its activated LoRA's invocation. "base" = the
            base, as in PEFT; "error" = nobody, it is refused.
        adapter_chat_template: What a chat with one adapter is rendered with. "ignore" = the base's
            chat template; "use" = the adapter's own, if its folder brings another.
        policy: Order of the waiting requests; "fcfs" = as they came.
        gpu_memory_utilization: Share of a GPU's memory for all of this, above 0 and at most 1.
        enforce_eager: True = decode steps are not captured.
        async_scheduling: Whether a step is prepared while the one before it runs. None = on a GPU.
        overlap_lora: Whether LoRA's first half runs beside the base's work. None = on a GPU.
        batch_invariant: Whether a row's bits never depend on its neighbours on a GPU, too.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    split_special_tokens: bool = False
    load_format: str = "auto"
    device: str = "cpu"
    dtype: str = "auto"
    quantization: str | None = None
    quantization_group_size: int | None = None
    generation_config: str = "auto"
    seed: int = 0
    max_logprobs: int = 20

    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    num_kv_blocks: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True

    max_loras: int = 16
    max_lora_rank: int = 512
    lora_pages: int | None = None
    lora_dtype: str = "auto"
    lora_scales: bool | None = None
    max_lora_token_rows: int = 256
    max_host_adapter_bytes: int | None = None
    adapter_sources: tuple[str, ...] = ()
    adapter_cache_dir: str | None = None
    adapter_cache_bytes: int | None = None
    alora_missing: str = "base"
    adapter_chat_template: str = "ignore"
    policy: str = "fcfs"

    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    overlap_lora: bool | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        self._check_numbers()
        self._check_dtypes()
        self._check_quantization()
        self._check_sources()
        for name, known in (
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("load_format", LOAD_FORMATS),
            ("generation_config", GENERATION_CONFIGS),
            ("alora_missing", ALORA_MISSING),
            ("adapter_chat_template", ADAPTER_CHAT_TEMPLATES),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, not {shown(getattr(self, name))}"
                )
        if not DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device must be cpu, cuda, cuda:N or auto, not {shown(self.device)}; "
                "use device='cpu' on a machine without an NVIDIA GPU"
            )

    def _check_numbers(self) -> None:
        can_be_none = [field.name for field in fields(self) if field.default is None]
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None or name not in can_be_none:
                _check_int(name, value, 1, most)
        _check_int("max_lora_token_rows", self.max_lora_token_rows, 0, 2**24)
        _check_int("max_logprobs", self.max_logprobs, -1, 2**31)
        _check_int("seed", self.seed, -(2**63), 2**63)
        if self.max_lora_rank % 8:
            raise ConfigError(f"max_lora_rank must be a multiple of 8, not {self.max_lora_rank}")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0, at most 1, not {shown(share)}"
            )

    def _check_dtypes(self) -> None:
        for name in ("dtype", "lora_dtype"):
            given = getattr(self, name)
            is_named = isinstance(given, str) or type(given).__module__ == "torch"
            text = str(given).removeprefix("torch.") if is_named else shown(given)
            object.__setattr__(self, name, DTYPE_ALIASES.get(text, text))
            if getattr(self, name) not in ("auto", *DTYPES):
                raise ConfigError(
                    f"{name} must be one of auto, {', '.join(DTYPES)}, not {shown(text)}"
                )

    def _check_types(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if field.name in ("dtype", "lora_dtype") or (value is None and "None" in kind):
                continue
            if kind.startswith("bool") and not isinstance(value, bool):
                raise ConfigError(f"{field.name} must be True or False, not {shown(value)}")
            if kind.startswith("str") and not isinstance(value, str):
                raise ConfigError(f"{field.name} must be a string, not {shown(value)}")

    def _check_quantization(self) -> None:
        kind, group = self.quantization, self.quantization_group_size
        if kind is not None and kind not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization must be None, {' or '.join(QUANTIZATIONS)}, not {shown(kind)}"
            )
        if group is None:
            return
        if not isinstance(group, int) or isinstance(group, bool) or group not in GROUP_SIZES:
            raise ConfigError(
                f"quantization_group_size must be None or one of {GROUP_SIZES}, not {shown(group)}"
            )
        if kind is None:
            raise ConfigError(
                f"quantization_group_size={group} needs quantization='int8' or 'int4'"
            )

    def _check_sources(self) -> None:
        given, begins = self.adapter_sources, tuple(f"{scheme}://" for scheme in ADAPTER_SCHEMES)
        try:
            prefixes: tuple[Any, ...] = tuple(given) if isinstance(given, list | tuple) else (None,)
        except Exception:  # a list of the caller's own
            prefixes = (None,)
        if not all(isinstance(one, str) and one.startswith(begins) for one in prefixes):
            raise ConfigError(
                f"adapter_sources must be a list of prefixes that begin with {', '.join(begins)}, "
                f"not {shown(given)}"
            )
        object.__setattr__(self, "adapter_sources", prefixes)

    def pages_per_site(self, is_gpu: bool) -> int:
        """Rank pages of each site: `lora_pages`, or rank 64 for each slot, on a GPU rank 32.

        A CPU's memory is taken by pages that are written to, a GPU's by all of them at the start:
        5.4 GB of the 8B shape and 26.5 GB of the 70B one would be much for what most adapters need.
        """
        return self.lora_pages or self.max_loras * (4 if is_gpu else 8)

    def has_lora_scales(self, is_gpu: bool) -> bool:
        """Whether adapters may have DoRA or biases."""
        return not is_gpu if self.lora_scales is None else self.lora_scales

    def is_async(self, is_gpu: bool) -> bool:
        """Whether a step is prepared while the one before it runs."""
        return is_gpu if self.async_scheduling is None else self.async_scheduling

    def overlaps(self, is_gpu: bool) -> bool:
        """Whether LoRA's shrink runs beside the base's work."""
        return is_gpu if self.overlap_lora is None else self.overlap_lora

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Like the constructor, and takes vLLM's settings while they ask for nothing we lack.

        An unknown name is a ConfigError that lists the known ones.
        """
        return cls(**without_vllms(kwargs, [f.name for f in fields(cls)]))


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
        what = "a positive integer" if low == 1 else f"an integer from {low}"
        bits = high.bit_length() - 1
        raise ConfigError(f"{name} must be {what}, below 2**{bits}, not {shown(value)}")
