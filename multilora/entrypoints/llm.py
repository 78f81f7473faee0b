"""Offline inference: prompts in, all answers out, in order. Names and shapes are vLLM's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.mix import AdapterSpec
from ..arguments import flag, folder, is_int, plain, read
from ..checkpoint.generation_config import sampling_defaults
from ..config.engine import EngineConfig
from ..engine.engine import Engine
from ..errors import ConfigError, EngineDeadError, RequestError, shown
from ..lora_request import LoRARequest
from ..outputs import RequestOutput
from ..sampling_params import RequestOutputKind, SamplingParams
from ..tokenization.chat_template import RESERVED
from .progress import Progress
from .prompts import Message, Prompt, as_conversations, as_prompts, for_each

if TYPE_CHECKING:
    from ..adapters.store import AdapterInfo
    from ..tokenization.tokenizer import Tokenizer

MAX_IDLE = 10.0  # seconds for which a policy may have everybody wait


class LLM:
    """One base model, many adapters, and a batch that mixes them.

    Not for two threads at once. `generate` steps the engine until its own prompts are answered, so
    outputs of requests that were added to `engine` by hand are not kept meanwhile.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        **settings: Any,
    ) -> None:
        """Loads the base from folder `model` and adapters from their folders, by name.

        `settings` are the fields of EngineConfig, and those of vLLM's that ask for nothing we lack
        (docs/vllm.md); others are a ConfigError. Raises CheckpointError, TokenizerError or
        AdapterError when files cannot be used.
        """
        own = None if tokenizer is None else folder(tokenizer, "tokenizer", ConfigError)
        base = folder(model, "model", ConfigError)
        config = EngineConfig.from_kwargs(model=base, tokenizer=own, **settings)
        self._defaults = {} if config.generation_config == "vllm" else sampling_defaults(base)
        self.engine = Engine(config)
        adapters = {} if adapters is None else adapters
        if not isinstance(adapters, Mapping):
            raise ConfigError(f"adapters must map names to folders, not {shown(adapters)}")
        for name, path in read(dict, adapters, "adapters").items():
            self.load_adapter(name, path)

    # Adapters ---------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        return self.engine.adapters

    def load_adapter(self, name: str, path: str | Path) -> str:
        """Loads an adapter folder under a name, which is replaced if loaded; returns its digest."""
        return self.engine.load_adapter(name, path)

    def register_adapter(self, name: str, path: str | Path, *, digest: str | None = None) -> None:
        """Makes `name` mean a folder that is read when a prompt names it; see `Engine`."""
        self.engine.register_adapter(name, path, digest=digest)

    def unload_adapter(self, name: str) -> None:
        """Forgets a name; AdapterNotFound when there is none."""
        self.engine.unload_adapter(name)

    # Answers ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: Sequence[int] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[RequestOutput]:
        """Answers one prompt or many; the results are in the order of the prompts.

        A prompt is text, token ids, or a dict with `prompt` or `prompt_token_ids`. Special tokens
        in text count, so that a rendered chat is a prompt, and BOS is added where it is missing;
        `LLM(..., split_special_tokens=True)` takes them for plain text. Parameters, adapter and
        `lora_request` are one for all prompts, or a list with one for each; without parameters
        `get_default_sampling_params()` holds. A `lora_request` whose name is not loaded from its
        folder yet is loaded. With `use_tqdm` a progress bar is shown on a terminal or in a
        notebook, if tqdm is installed; a callable makes the bar.

        When any prompt cannot be accepted, none is answered and the error is raised.
        """
        items = as_prompts(prompts)
        params, specs, requests = self._asked(len(items), sampling_params, adapter, lora_request)
        _check_priorities(priority, len(items))
        return self._answer(items, params, specs, requests, use_tqdm)

    def _asked(
        self, count: int, sampling_params: object, adapter: object, lora_request: object
    ) -> tuple[list[SamplingParams | None], list[AdapterSpec], list[LoRARequest | None]]:
        """Parameters, adapter and LoRARequest of each prompt; folders of those are loaded."""
        params = for_each(sampling_params, count, "sampling_params")
        for one in params:
            if one is not None and not isinstance(one, SamplingParams):
                raise RequestError(f"sampling_params must be SamplingParams, not {shown(one)}")
        requests = for_each(lora_request, count, "lora_request")
        return params, self._specs(for_each(adapter, count, "adapter"), requests), requests

    def _answer(
        self,
        items: Sequence[Prompt],
        params: Sequence[SamplingParams | None],
        specs: Sequence[AdapterSpec],
        requests: Sequence[LoRARequest | None],
        use_tqdm: bool | Callable[..., Any],
    ) -> list[RequestOutput]:
        """All answers, or none if any prompt cannot be accepted."""
        default, added = self.get_default_sampling_params(), list[str]()
        before = frozenset(self.engine.request_ids)
        try:
            for item, one, spec in zip(items, params, specs, strict=True):
                asked = (default if one is None else one).clone(
                    output_kind=RequestOutputKind.FINAL_ONLY
                )
                added.append(self.engine.add_request(item, asked, adapter=spec))
            found = self._finish(added, use_tqdm)
        except BaseException:  # KeyboardInterrupt too: nothing may go on running unseen
            self._abort_all_but(before)
            raise
        return [
            output if request is None else replace(output, lora_request=request)
            for output, request in zip(found, requests, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        *,
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or a list of them, through the chat template.

        To go on with the last message, set `continue_final_message=True` and
        `add_generation_prompt=False`. `tools` and `chat_template_kwargs`, e.g.
        `{"enable_thinking": False}`, are for the template. Special tokens in any of these are
        plain text. `chat_template` is a template's text, or the name of one of the tokenizer's own;
        without it `LLM(..., adapter_chat_template="use")` takes that of a conversation's adapter.

        Raises ConfigError without a tokenizer, TokenizerError when it has no chat template,
        RequestError for what the template does not take.
        """
        tokenizer = self.get_tokenizer()
        given = {
            **_variables(chat_template_kwargs),
            "add_generation_prompt": flag(add_generation_prompt, "add_generation_prompt"),
            "continue_final_message": continue_final_message,
            "tools": tools,
        }
        if chat_template is not None:
            given["chat_template"] = chat_template
        conversations = as_conversations(messages)
        params, specs, requests = self._asked(
            len(conversations), sampling_params, adapter, lora_request
        )
        longest = self.engine.max_model_len - 1  # and one new token
        items: list[Prompt] = []
        for one, spec in zip(conversations, specs, strict=True):
            own = None if chat_template is not None else self.engine.adapter_chat_template(spec)
            ask = given if own is None else {**given, "chat_template": own}
            text, ids = tokenizer.chat_prompt(one, max_length=longest, **ask)
            items.append({"prompt": text, "prompt_token_ids": ids})
        return self._answer(items, params, specs, requests, use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where no parameters are given: those of the model's generation_config.json."""
        return SamplingParams(**self._defaults)

    # The engine -------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; ConfigError when there is none."""
        if self.engine.tokenizer is None:
            raise ConfigError("this needs a tokenizer; start without skip_tokenizer_init=True")
        return self.engine.tokenizer

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached KV; False, and nothing done, while requests hold some of it."""
        return self.engine.reset_prefix_cache()

    def get_metrics(self) -> dict[str, int]:
        """The engine's counters by name, see `EngineStats`."""
        return asdict(self.engine.stats)

    def _specs(
        self, adapters: Sequence[AdapterSpec], requests: Sequence[LoRARequest | None]
    ) -> list[AdapterSpec]:
        """The adapters of the prompts; folders of `LoRARequest`s are loaded."""
        specs = list(adapters)
        fresh: set[str] = set()
        paths: dict[str, str] = {}
        for i, request in enumerate(requests):
            if request is None:
                continue
            if not isinstance(request, LoRARequest):
                raise RequestError(f"lora_request must be a LoRARequest, not {shown(request)}")
            if specs[i] is not None:
                raise RequestError("give adapter or lora_request, not both")
            name, path = request.lora_name, request.lora_path
            if paths.setdefault(name, path) != path:
                raise RequestError(
                    f"two prompts of one call name {shown(name)} and mean {shown(paths[name])} and "
                    f"{shown(path)}: a name is one adapter here; give each its own"
                )
            is_loaded = self.engine.store.has(name) and self.engine.adapter_path(name) == path
            if not is_loaded or (request.load_inplace and name not in fresh):
                self.load_adapter(name, path)
                fresh.add(name)
            specs[i] = name
        return specs

    def _abort_all_but(self, others: frozenset[str]) -> None:
        """Ends what `generate` began, whether it knows of it or not; a second Ctrl-C waits."""
        while True:
            try:
                for request_id in self.engine.request_ids:
                    if request_id not in others:
                        self.engine.abort(request_id)
                return
            except KeyboardInterrupt:
                continue
            except EngineDeadError:
                return

    def _finish(
        self, request_ids: list[str], use_tqdm: bool | Callable[..., Any]
    ) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        wanted = set(request_ids)
        idle_since: float | None = None
        with Progress(len(request_ids), use_tqdm) as progress:
            while len(done) < len(wanted):
                assert self.engine.has_work, "the engine stopped before all requests finished"
                outputs = self.engine.step()
                scheduler = self.engine.scheduler
                is_idle = not outputs and not scheduler.running and len(scheduler.waiting) > 0
                idle_since = self._wait(idle_since) if is_idle else None
                for output in outputs:
                    if output.request_id in wanted:
                        progress.update(output)
                        done[output.request_id] = output
        return [done[request_id] for request_id in request_ids]

    def _wait(self, since: float | None) -> float:
        """Waits a little for a policy that has everybody wait since then, None = from now on.

        ConfigError if it does so for long. Returns since when it does.
        """
        now = time.monotonic()
        if since is not None and now - since > MAX_IDLE:
            raise ConfigError(
                f"policy {self.engine.config.policy!r} has admitted none of "
                f"{len(self.engine.scheduler.waiting)} waiting requests for {MAX_IDLE:g} s, while "
                "nothing runs; its order() must return some of them"
            )
        time.sleep(0.001)
        return now if since is None else since


def _check_priorities(priority: object, count: int) -> None:
    if priority is None:
        return
    for one in for_each(priority, count, "priority"):  # a Sequence has no priority to order by
        if not is_int(one := plain(one)) or one:
            raise RequestError(
                f"priority {shown(one)}: requests have none here; order them by `policy`, or leave "
                "it 0"
            )


def _variables(given: object) -> Mapping[str, Any]:
    """Variables for a chat template, none of them an argument of `chat`."""
    given = {} if given is None else given
    given = read(dict, given, "chat_template_kwargs") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RequestError(f"chat_template_kwargs must be a dict of names, not {shown(given)}")
    if taken := given.keys() & RESERVED:
        raise RequestError(f"give {min(taken)} as an argument, not in chat_template_kwargs")
    return given
