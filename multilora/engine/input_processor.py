"""What a caller asks becomes sequences, or a RequestError: prompts, ids, end tokens, seeds."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from typing import Any

from ..arguments import read
from ..config.engine import EngineConfig
from ..errors import CapacityError, RequestError, shown
from ..sampling_params import SamplingParams
from ..scheduling.sequence import Sequence
from ..tokenization.tokenizer import Tokenizer
from .output_processor import CompletionState, RequestState


class InputProcessor:
    """Checks and tokenises prompts for one model."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        end_ids: frozenset[int],
        *,
        is_gpu: bool = False,
    ) -> None:
        self._seed, self._tokenizer, self._is_gpu = config.seed, tokenizer, is_gpu
        self._max_logprobs = config.max_logprobs
        self._split = config.split_special_tokens
        self._vocab_size, self._max_len, self._end_ids = vocab_size, max_model_len, end_ids
        self._seq_ids = itertools.count()

    def prompt_text(self, prompt: object) -> str | None:
        """The prompt's text, if it has one."""
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        return text if isinstance(text, str) else None

    def prompt_ids(
        self, prompt: str | Ids[int] | Mapping[str, Any], params: SamplingParams
    ) -> list[int]:
        """The prompt's token ids. A RequestError for them, or for ids that the parameters name.

        A CapacityError for text that is too long whatever its tokens are, before they are found.
        """
        if isinstance(prompt, Mapping):
            prompt = _of_dict(prompt)
        if not isinstance(prompt, Ids) or isinstance(prompt, bytes):
            what = type(prompt).__name__
            raise RequestError(f"a prompt is text or a list of token ids, not of type {what}")
        count = 0 if isinstance(prompt, str) else read(len, prompt, "the prompt")
        if count >= self._max_len:  # before it is copied
            raise CapacityError(
                f"a prompt of {count} tokens and one new token exceed max_model_len "
                f"{self._max_len} tokens; shorten the prompt or raise max_model_len"
            )
        ids = self._encode(prompt) if isinstance(prompt, str) else read(list, prompt, "the prompt")
        self._check_ids(ids, params)
        return ids

    def _encode(self, prompt: str) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise RequestError("skip_tokenizer_init=True serves token ids only; give a list of ids")
        most = self._max_len - 1  # and one new token
        if self._split:
            return tokenizer.encode(prompt, max_length=most)
        return tokenizer.encode_with_special(prompt, add_special_tokens=True, max_length=most)

    def bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The ids of each bad word, at the start of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words or ():
            assert self._tokenizer is not None
            word = word.strip()
            first, inner = (
                tuple(self._tokenizer.encode(text, add_special_tokens=False))
                for text in (word, f" {word}")
            )
            found[first] = None
            if inner[-len(first) :] != first:
                found[inner] = None
        return tuple(found)

    def start(self, state: RequestState, arrival: int) -> list[Sequence]:
        """The answers of a request: its sequences, as yet unknown to the scheduler."""
        params = [state.params] * state.params.n
        if state.params.prompt_logprobs is not None:  # one of them scores the prompt
            params[1:] = [state.params.clone(prompt_logprobs=None)] * (len(params) - 1)
        seqs = [self._sequence(state, own, i, arrival) for i, own in enumerate(params)]
        state.answers = [CompletionState(seq, self._tokenizer) for seq in seqs]
        return seqs

    def _sequence(
        self,
        state: RequestState,
        params: SamplingParams,
        index: int,
        arrival: int,
    ) -> Sequence:
        ids, limit = state.prompt_ids, self._max_len
        seed = params.seed if params.seed is not None else _seed(self._seed, arrival)
        total = limit if params.max_tokens is None else min(limit, len(ids) + params.max_tokens)
        seq = Sequence(
            seq_id=next(self._seq_ids),
            request_id=state.request_id,
            index=index,
            params=params,
            prompt_ids=ids,
            seed=seed + index,
            arrival=arrival,
            max_total=total,
            stop_ids=self._stop_ids(params),
            bad_words=state.bad_words,
        )
        if state.activation is not None:
            seq.activate(state.activation)
        return seq

    def _check_ids(self, ids: list[int], params: SamplingParams) -> None:
        vocab = self._vocab_size
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        named = {
            "prompt": ids,
            "stop_token_ids": params.stop_token_ids or (),
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": list(params.logit_bias or ()),
        }
        for name, values in named.items():
            for token in values:
                if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
                    raise RequestError(
                        f"{name}: {shown(token)} is not a token id of this model (0..{vocab - 1})"
                    )
        self._check_params(params)

    def _check_params(self, params: SamplingParams) -> None:
        if self._tokenizer is None and params.stop:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        if self._tokenizer is None and params.bad_words:
            raise RequestError("bad_words need a tokenizer; use logit_bias")
        limit = self._max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and limit != -1 and not 0 <= count <= limit:
                raise RequestError(
                    f"{name}={count} is more than max_logprobs={limit} of the engine; start it "
                    "with a larger max_logprobs, -1 for all"
                )
        for function in params.logits_processors or ():
            if self._is_gpu:
                raise RequestError(
                    "logits_processors see each token on the host, so a GPU would wait for them: "
                    "use device='cpu', or logit_bias, allowed_token_ids and bad_words"
                )
            try:
                count = len(inspect.signature(function).parameters)
            except (TypeError, ValueError):
                count = 0
            if count not in (2, 3):
                raise RequestError(
                    f"a logits processor takes (output ids, logits) or (prompt ids, output ids, "
                    f"logits), which {shown(function)} does not"
                )

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        ends = frozenset[int]() if params.ignore_eos else self._end_ids
        return ends.union(params.stop_token_ids or ())


def _of_dict(prompt: Mapping[str, Any]) -> Any:
    """The prompt in a dict as vLLM has them: its token ids, or its text."""
    if others := [name for name in prompt if name not in ("prompt", "prompt_token_ids")]:
        raise RequestError(
            f"a prompt has {shown(others[0])}, which is not supported: give `prompt` or "
            "`prompt_token_ids`"
        )
    ids = prompt.get("prompt_token_ids")
    return prompt.get("prompt") if ids is None else ids


def _seed(base: int, number: int) -> int:
    """A seed for request `number`, unlike its neighbours'."""
    digest = hashlib.sha256(f"{base}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
