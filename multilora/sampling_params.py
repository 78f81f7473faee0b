"""What a user asks for and what comes back: sampling parameters, a request's life, its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, fields
from typing import Any

from .errors import RequestError, shown

# Caps on what one request may ask for: each is a denial of service when unbounded.
MAX_N, MAX_LOGPROBS, MAX_STOPS, MAX_STOP_CHARS, MAX_BIASED = 128, 20, 16, 1024, 1024
MAX_COUNT = 2**63 - 1  # what no other limit bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Names, meanings and defaults are vLLM's."""

    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 or -1 = all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output; > 1 discourages
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output, for each occurrence
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Ids[int] | None = None
    seed: int | None = None
    max_tokens: int | None = 16  # None = up to max_model_len
    min_tokens: int = 0  # no end of sequence or stop before so many
    stop: str | Ids[str] = ()
    stop_token_ids: Ids[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # top logprobs of each new token, of the model's own distribution
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        self._check_counts()
        self._check_numbers()
        if len(stop) > MAX_STOPS or any(not isinstance(s, str) or not s for s in stop):
            raise RequestError(
                f"stop must be at most {MAX_STOPS} non-empty strings, not {shown(self.stop)}"
            )
        if any(len(s) > MAX_STOP_CHARS for s in stop):
            raise RequestError(f"a stop string may have at most {MAX_STOP_CHARS} characters")
        if stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids instead")
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name)
            for token in ids or ():
                if not _is_int(token) or token < 0:
                    raise RequestError(f"{name} must be token ids, not {shown(token)}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids is empty: no token could be chosen; give None for all"
            )
        bias = self.logit_bias or {}
        if len(bias) > MAX_BIASED:
            raise RequestError(f"logit_bias may name at most {MAX_BIASED} tokens, not {len(bias)}")
        for token, value in bias.items():
            if not _is_int(token) or token < 0 or not _finite(value) or not -100 <= value <= 100:
                entry = f"{{{shown(token)}: {shown(value)}}}"
                raise RequestError(f"logit_bias {entry}: ids map to -100..100")

    def _check_counts(self) -> None:
        for name, low, high in (
            ("n", 1, MAX_N),
            ("top_k", -1, MAX_COUNT),
            ("min_tokens", 0, MAX_COUNT),
            ("max_tokens", 1, MAX_COUNT),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("seed", -(2**63), MAX_COUNT),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "logprobs", "prompt_logprobs", "seed"):
                continue
            if not _is_int(value) or not low <= value <= high:
                limit = f"from {low} to {high}" if high != MAX_COUNT else f">= {low}"
                raise RequestError(f"{name} must be an integer {limit}, not {shown(value)}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}"
            )

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if not _finite(value) or not low <= value <= high:
                raise RequestError(
                    f"{name} must be a number from {low} to {high}, not {shown(value)}"
                )
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise RequestError("top_p and repetition_penalty must be above 0")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> SamplingParams:
        """Like the constructor, but an unknown name is a RequestError that lists the known ones."""
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise RequestError(
                    f"unknown sampling parameter {name!r}; known: {', '.join(known)}"
                )
        return cls(**kwargs)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
