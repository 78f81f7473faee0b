"""How the tokens of a request are sampled, and how its answers are given."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

from .arguments import flag, is_int, is_number, items, plain, read
from .errors import RequestError, shown

# Caps on what one request may ask for: each is a denial of service when unbounded.
MAX_N, MAX_STOPS, MAX_STOP_CHARS, MAX_BIASED = 128, 16, 1024, 1024
MAX_BAD_WORDS, MAX_BAD_CHARS, MAX_IDS = 256, 256, 1 << 20

LogitsProcessorLike = Callable[..., Any]
"""(output ids, logits) or (prompt ids, output ids, logits) -> logits, fp32 [vocab]."""


class RequestOutputKind(enum.Enum):
    """What the outputs of a request tell while it runs; the names and values are vLLM's."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what has come since the output before
    FINAL_ONLY = 2  # nothing before all answers have ended


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are sampled. Names, meanings and defaults are vLLM's.

    Immutable: `clone(temperature=0)` makes a changed copy. Numbers of numpy and torch count as
    Python's. Raises RequestError for a value out of range, and for a name that is no parameter.

    Attributes:
        n: Answers to the prompt, at most 128; the i-th samples with seed + i.
        temperature: Divides the logits: below 1 likely tokens are likelier still. 0 = greedy.
        top_k: Samples from so many of the likeliest tokens only. 0 or -1 = from all.
        top_p: Samples from the likeliest tokens that together have this probability, in (0, 1].
        min_p: Least probability of a token, as a share of the likeliest one's, in [0, 1].
        repetition_penalty: Divides positive logits of tokens in prompt and output, multiplies
            negative ones.
        presence_penalty: Taken off the logits of tokens in the output, -2 to 2.
        frequency_penalty: Taken off the logits of tokens in the output for each occurrence, -2 to
            2.
        logit_bias: Token id -> number that is added to its logit, -100 to 100. Ids may be strings
            of digits.
        allowed_token_ids: The only tokens that may be generated. None = all.
        bad_words: Words that are not generated: the token that would complete one, as the tokenizer
            writes it at the start of a text or after a space, is impossible.
        logits_processors: Called, in order, with (output ids, logits) or (prompt ids, output ids,
            logits); they return the logits, fp32 [vocab], which they may change in place. On a CPU
            only.
        seed: Of the random numbers, which depend on it and the position alone. None or -1 = one of
            its own.
        max_tokens: Most tokens of an answer. None = up to `max_model_len`.
        min_tokens: No end of sequence, stop token or stop string before so many tokens.
        stop: Texts that end an answer where they first occur. They are not part of its text.
        stop_token_ids: Tokens that end an answer. They are not part of its text.
        include_stop_str_in_output: Whether what ended an answer, a stop text or token, is part of
            its text.
        ignore_eos: Whether the model's own end tokens do not end an answer.
        logprobs: Log probabilities of so many of the likeliest tokens at each place, and of the one
            that was sampled: of the model's own distribution. 0 = of that one alone, -1 = of all,
            None = none.
        prompt_logprobs: The same for the tokens of the prompt, from its second on.
        detokenize: Whether answers have text. Stop texts need it.
        skip_special_tokens: Whether special tokens are left out of the text.
        output_kind: What each output of `Engine.step` tells.
        stream_interval: Tokens of an answer from one output to the next, but for its first and its
            last. None = 1.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Ids[int] | None = None
    bad_words: Ids[str] | None = None
    logits_processors: Ids[LogitsProcessorLike] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Ids[str] | None = None
    stop_token_ids: Ids[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            given, is_flag = getattr(self, field.name), isinstance(field.default, bool)
            self._set(field.name, flag(given, field.name) if is_flag else plain(given))
        if is_int(self.seed) and self.seed == -1:
            self._set("seed", None)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                self._set(name, 1)
        self._check_counts()
        self._check_numbers()
        self._check_stops()
        self._check_ids()
        self._check_bias()
        self._check_words()
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestError(
                f"output_kind must be a RequestOutputKind, not {shown(self.output_kind)}"
            )

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy, with other values for the fields that are named."""
        return replace(self, **changes)

    @property
    def num_logprobs(self) -> int | None:
        """`logprobs`, with a number that no vocabulary has for -1."""
        return MAX_IDS if self.logprobs == -1 else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """`prompt_logprobs`, likewise."""
        return MAX_IDS if self.prompt_logprobs == -1 else self.prompt_logprobs

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_counts(self) -> None:
        for name, low, high in (
            ("n", 1, MAX_N),
            ("top_k", -1, None),
            ("min_tokens", 0, None),
            ("max_tokens", 1, None),
            ("logprobs", -1, None),
            ("prompt_logprobs", -1, None),
            ("stream_interval", 1, None),
            ("seed", -(2**63), 2**63 - 1),
        ):
            value = getattr(self, name)
            if value is None and name not in ("n", "top_k", "min_tokens"):
                continue
            if not is_int(value) or value < low or value > (high or 2**63 - 1):
                limit = f"from {low} to {high}" if high is not None else f">= {low}"
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
            if not is_number(value) or not low <= value <= high:
                raise RequestError(
                    f"{name} must be a number from {low} to {high}, not {shown(value)}"
                )
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise RequestError("top_p and repetition_penalty must be above 0")

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else items(self.stop, "stop", MAX_STOPS)
        if any(not isinstance(s, str) or not s for s in stop):
            raise RequestError(f"stop must be non-empty strings, not {shown(self.stop)}")
        if any(len(s) > MAX_STOP_CHARS for s in stop):
            raise RequestError(f"a stop string may have at most {MAX_STOP_CHARS} characters")
        if stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids instead")
        self._set("stop", stop)

    def _check_ids(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            ids = tuple(plain(i) for i in items(value, name, MAX_IDS))
            for token in ids:
                if not _is_token(token):
                    raise RequestError(f"{name} must be token ids, not {shown(token)}")
            ids = tuple(dict.fromkeys(ids))
            self._set(name, None if value is None and name == "allowed_token_ids" else ids)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids is empty: no token could be chosen; give None for all"
            )

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(
                f"logit_bias must map token ids to numbers, not {shown(self.logit_bias)}"
            )
        count = read(len, self.logit_bias, "logit_bias")
        if count > MAX_BIASED:
            raise RequestError(f"logit_bias may name at most {MAX_BIASED} tokens, not {count}")
        bias = {}
        for key, value in read(lambda given: list(given.items()), self.logit_bias, "logit_bias"):
            token, value = plain(key), plain(value)
            if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20:
                token = int(token)
            if not _is_token(token) or not is_number(value) or abs(value) > 100:
                entry = f"{{{shown(key)}: {shown(value)}}}"
                raise RequestError(f"logit_bias {entry}: ids map to -100..100")
            bias[token] = float(value)
        self._set("logit_bias", bias)  # a copy: the caller's may change

    def _check_words(self) -> None:
        words = (self.bad_words,) if isinstance(self.bad_words, str) else self.bad_words
        words = items(words, "bad_words", MAX_BAD_WORDS)
        if any(not isinstance(w, str) or not w.strip() or len(w) > MAX_BAD_CHARS for w in words):
            raise RequestError(
                f"bad_words must be words of at most {MAX_BAD_CHARS} characters, not "
                f"{shown(self.bad_words)}"
            )
        processors = items(self.logits_processors, "logits_processors", MAX_STOPS)
        if not all(callable(processor) for processor in processors):
            raise RequestError(f"logits_processors must be callables, not {shown(processors)}")
        self._set("bad_words", words)
        self._set("logits_processors", processors)


# What vLLM's users may name that we do not have: the values that ask for nothing, and why not more.
# `docs/vllm.md` has the table, which a test holds to a list of vLLM's fields.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "structured_outputs": (
        (None,),
        "grammars come with the server; until then use allowed_token_ids or logits_processors",
    ),
    "spaces_between_special_tokens": (
        (True, False),
        "no tokenizer of a Llama makes a difference of it",
    ),
    "flat_logprobs": ((False,), "logprobs are a list of dicts"),
    "logprob_token_ids": ((None,), "ask for logprobs=-1 and take those tokens"),
    "prompt_logprob_token_ids": ((None,), "ask for prompt_logprobs=-1 and take those tokens"),
    "prompt_logprob_start": ((None, 0), "all tokens of the prompt are scored"),
    "skip_reading_prefix_cache": (
        (None, False),
        "answers are the same with and without it; enable_prefix_caching=False switches it off",
    ),
    "thinking_token_budget": ((None, -1), "there is no model here whose thinking is marked"),
    "repetition_detection": ((None,), "use frequency_penalty or a logits processor"),
    "extra_args": ((None, {}), "no sampler here reads them"),
    "routed_experts_prompt_start": ((0,), "a Llama has no experts to route to"),
    "trace_decode_token_ids": ((None,), "score a given answer by prompt_logprobs"),
    "skip_clone": ((True, False), "parameters are immutable and never cloned"),
    "output_text_buffer_length": ((0,), "it follows from stop"),
    "best_of": ((None, 1), "ask for n answers and compare cumulative_logprob"),
    "use_beam_search": ((False,), "there is no beam search"),
    "length_penalty": ((1.0,), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "truncate_prompt_tokens": ((None,), "cut the prompt's token ids before the call"),
    "guided_decoding": ((None,), "see structured_outputs"),
}


def _accepting(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, with an error that names the parameters for what is none of them."""
    known = [field.name for field in fields(SamplingParams)]

    @wraps(init)
    def __init__(self: SamplingParams, *args: Any, **kwargs: Any) -> None:
        if args:
            raise RequestError("SamplingParams takes its values by name, as in temperature=0")
        for name in [name for name in kwargs if name not in known]:
            value = kwargs.pop(name)
            if name not in REFUSED:
                raise RequestError(
                    f"unknown sampling parameter {shown(name)}; known: {', '.join(known)}"
                )
            inert, why = REFUSED[name]
            if not any(value is one or (is_number(value) and value == one) for one in inert):
                raise RequestError(f"{name}={shown(value)} is not supported: {why}")
        init(self, **kwargs)

    return __init__


SamplingParams.__init__ = _accepting(SamplingParams.__init__)  # type: ignore[method-assign]


def _is_token(value: object) -> bool:
    return is_int(value) and 0 <= value < 2**31  # type: ignore[operator]
