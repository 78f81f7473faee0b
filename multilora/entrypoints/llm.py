"""Offline inference: prompts in, all answers out, in order. Names and shapes are vLLM's."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..adapters.mix import AdapterSpec
from ..config.engine import EngineConfig
from ..engine.engine import Engine
from ..errors import ConfigError, RequestError
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from ..tokenization.chat_template import TAKEN

if TYPE_CHECKING:
    from pathlib import Path

    from ..adapters.store import AdapterInfo

Prompt = str | Sequence[int]  # text, or token ids
Message = Mapping[str, Any]  # {"role": ..., "content": ...}


class LLM:
    """One base model, many adapters, and a batch that mixes them.

    Not for two threads at once. `generate` steps the engine until its own prompts are answered, so
    outputs of requests that were added to `engine` by hand are not kept meanwhile.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        **settings: Any,
    ) -> None:
        """Loads the base from folder `model` and adapters from their folders, by name.

        `settings` are the fields of EngineConfig; an unknown one is a ConfigError. Raises
        CheckpointError, TokenizerError or AdapterError when files cannot be used.
        """
        self.engine = Engine(EngineConfig.from_kwargs(model=str(model), **settings))
        for name, path in (adapters or {}).items():
            self.engine.load_adapter(name, path)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        return self.engine.adapters

    def load_adapter(self, name: str, path: str | Path) -> str:
        """Loads an adapter folder under a name, which is replaced if loaded; returns its digest."""
        return self.engine.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forgets a name; AdapterNotFound when there is none."""
        self.engine.unload_adapter(name)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one prompt or many; the results are in the order of the prompts.

        A prompt is text or token ids. Special tokens in text count, so that a rendered chat is a
        prompt, and BOS is added where it is missing; `LLM(..., split_special_tokens=True)` takes
        them for plain text. Parameters and adapter are one for all prompts, or a list
        with one for each. With `use_tqdm` a progress bar is shown on a terminal, if tqdm is
        installed. When any prompt cannot be accepted, none is answered and the error is raised.
        """
        items = _as_prompts(prompts)
        params = _for_each(sampling_params, len(items), "sampling_params")
        for one in params:
            if one is not None and not isinstance(one, SamplingParams):
                raise RequestError(f"sampling_params must be SamplingParams, not {one!r}")
        adapters = _for_each(adapter, len(items), "adapter")
        added: list[str] = []
        try:
            for item, one, spec in zip(items, params, adapters, strict=True):
                added.append(self.engine.add_request(item, one, adapter=spec))
            return self._finish(added, use_tqdm=use_tqdm)
        except BaseException:  # KeyboardInterrupt too: nothing may go on running unseen
            for request_id in added:
                self.engine.abort(request_id)
            raise

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or a list of them, through the chat template.

        To go on with the last message, set `continue_final_message=True` and
        `add_generation_prompt=False`. `tools` and `chat_template_kwargs`, e.g.
        `{"enable_thinking": False}`, are for the template. Special tokens in any of these are
        plain text. Raises ConfigError without a tokenizer, TokenizerError when it has no chat
        template, RequestError for what the template does not take.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ConfigError("chat needs a tokenizer; start without skip_tokenizer_init=True")
        given = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise RequestError(f"chat_template_kwargs must be a dict of names, not {given!r:.80}")
        if taken := given.keys() & TAKEN:
            raise RequestError(f"give {min(taken)} as an argument, not in chat_template_kwargs")
        prompts = [
            tokenizer.apply_chat_template(
                one,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                max_length=self.engine.max_model_len - 1,  # and one new token
                **given,
            )
            for one in _as_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, adapter=adapter, use_tqdm=use_tqdm)

    def _finish(self, request_ids: list[str], *, use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        wanted = set(request_ids)
        with _Progress(len(request_ids), shown=use_tqdm) as progress:
            while len(done) < len(wanted):
                assert self.engine.has_work, "the engine stopped before all requests finished"
                for output in self.engine.step():
                    if output.request_id not in wanted:
                        continue
                    progress.update(output)
                    if output.finished:
                        done[output.request_id] = output
        return [done[request_id] for request_id in request_ids]


class _Progress:
    """A tqdm bar of finished requests with output tokens per second, or nothing."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bar: Any = None
        self._tokens: dict[str, int] = {}
        self._start = time.perf_counter()
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:  # the bar is part of the extra `cli`
                return
            self._bar = tqdm(total=total, desc="Answered", unit="prompt", dynamic_ncols=True)

    def update(self, output: RequestOutput) -> None:
        """Counts the tokens of a cumulative output."""
        if self._bar is None:
            return
        self._tokens[output.request_id] = sum(len(o.token_ids) for o in output.outputs)
        rate = sum(self._tokens.values()) / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
        self._bar.update(1 if output.finished else 0)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one or many."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts must be text, token ids or a list of them, not {prompts!r}")
    if any(isinstance(item, int) for item in prompts):  # one prompt of token ids
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in prompts):
            raise RequestError("prompts mixes token ids with other items; put the ids in a list")
        return [[item for item in prompts if isinstance(item, int)]]
    many: list[Prompt] = []
    for i, item in enumerate(prompts):
        if isinstance(item, int) or not isinstance(item, Sequence):
            raise RequestError(f"prompt {i} must be text or a list of token ids, not {item!r}")
        many.append(item)
    return many


def _as_conversations(messages: object) -> list[list[Message]]:
    """A list of conversations from one or many."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(
            'messages must be a list like [{"role": "user", "content": "..."}], '
            f"or a list of such lists, not {type(messages).__name__}"
        )
    single: list[Message] = []
    many: list[list[Message]] = []
    for item in messages:
        if isinstance(item, Mapping):
            single.append(item)
        elif isinstance(item, Sequence) and not isinstance(item, str):
            many.append(list(item))
        else:
            raise RequestError(f"a message must be a dict with role and content, not {item!r}")
    if single and many:
        raise RequestError("messages mixes messages with conversations; give one or the other")
    return many or ([single] if single else [])


def _for_each(value: Any, count: int, what: str) -> list[Any]:
    """`value` for each of `count` prompts: it is one for all, or a list of as many."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise RequestError(
            f"{what} has {len(value)} entries for {count} prompts; give one for each, or one "
            "for all"
        )
    return list(value)
