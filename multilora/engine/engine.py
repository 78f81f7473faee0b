"""The engine: requests in, one step at a time, outputs back. No threads, no asyncio, no HTTP.

Calls from several threads wait for each other; one from within a call is an EngineBusyError, and so
is one in a fork of the process that made the engine.
Whatever is raised within a call, the next one finds all in order: see `core`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ids
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..adapters.loader import (
    AdapterLoader,
    AdapterSource,
    LoadedAdapter,
    RegisteredAdapter,
    RegistryChanges,
    check_digest,
)
from ..adapters.mix import AdapterSpec, check_name, names_of
from ..adapters.registry import read_registry
from ..adapters.store import AdapterInfo
from ..arguments import read
from ..config.engine import EngineConfig
from ..device.cpu import return_freed_memory
from ..errors import (
    AdapterInvalid,
    AdapterNotFound,
    CapacityError,
    ConfigError,
    RequestError,
    shown,
)
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from .adapter_reader import AdapterReader
from .builder import build
from .core import EngineCore
from .exclusive import Change, Gate, check_process, exclusive
from .input_processor import InputProcessor
from .output_processor import RequestState
from .stats import EngineStats

_Given = TypeVar("_Given")


class Engine:
    """Serves one base model and any number of adapters, step by step.

    Raises ConfigError, CheckpointError or TokenizerError if it cannot be made. Later any call
    raises EngineDeadError once nothing runs any more.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        resolver: Callable[[str], str | Path | None] | None = None,
    ) -> None:
        """`resolver` is asked where an adapter lies that nobody knows; None = unknown."""
        if not isinstance(config, EngineConfig):
            raise ConfigError(
                f"Engine takes an EngineConfig, as in Engine(EngineConfig(model=...)), not "
                f"{shown(config)}"
            )
        if resolver is not None and not callable(resolver):
            raise ConfigError(f"a resolver is a function of a name, not {shown(resolver)}")
        check_process()
        self.config = config
        parts = build(config)
        self.model_config, self.model, self.tokenizer = (
            parts.model_config,
            parts.model,
            parts.tokenizer,
        )
        self.store, self.runner, self.pool = parts.store, parts.runner, parts.pool
        self.scheduler, self.max_model_len = parts.scheduler, parts.max_model_len
        self._inputs = InputProcessor(
            config,
            self.tokenizer,
            self.model_config.vocab_size,
            self.max_model_len,
            parts.end_ids,
            is_gpu=parts.device.is_cuda,
        )
        depth = 2 if config.is_async(parts.device.is_cuda) else 1
        self.reader = AdapterReader(
            config, self.model_config, self.model, self.store, self.tokenizer
        )
        self._loader = AdapterLoader(
            self.store, self.reader.read, config.max_host_adapter_bytes, resolver
        )
        self._core = EngineCore(
            self.scheduler, self.pool, self.store, self._loader, self.runner, depth, parts.clock
        )
        self._clock, self._wall_clock = parts.clock, parts.wall_clock
        self._gate = Gate(self._core)
        self._arrivals = itertools.count()
        self._needs, self._compilations = parts.needs, parts.device.compilations

    # Requests ---------------------------------------------------------------------------------

    @exclusive
    def add_request(
        self,
        prompt: str | Ids[int] | Mapping[str, Any],
        params: SamplingParams | None = None,
        *,
        adapter: AdapterSpec = None,
        request_id: str | None = None,
    ) -> str:
        """Queues a request and returns its id.

        A prompt is text, token ids, or a dict with `prompt`, `prompt_token_ids` or both: then the
        ids count, and the text is what outputs show.
        `adapter` is an adapter's name, a mapping of names to weights, or None for the base; a name
        may ask for a version by the first digits of its digest, as in job@3fa9c1. An adapter
        that is registered and not loaded is loaded beside the steps; until then the request waits,
        and gets what its names mean when all are there.
        Raises RequestError, CapacityError, AdapterNotFound, or why an adapter was not loaded just
        now; then nothing has changed.
        """
        self._core.forget_told()
        params = params if params is not None else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {shown(params)}")
        prompt, adapter = _copied(prompt, "prompt"), _copied(adapter, "adapter")
        number = next(self._arrivals)
        while request_id is None and f"request-{number}" in self._core.requests:
            number = next(self._arrivals)  # a caller has taken that name
        request_id = f"request-{number}" if request_id is None else request_id
        if not isinstance(request_id, str):
            raise RequestError(f"a request id must be a string, not {shown(request_id)}")
        if request_id in self._core.requests:
            raise RequestError(f"request id {shown(request_id)} is in use; give another or none")
        ids, bad_words = self._inputs.prompt_ids(prompt, params), self._inputs.bad_words(params)
        text = self._inputs.prompt_text(prompt)
        arrived = self._wall_clock(), self._clock()
        with Change(self._core):
            missing = self._loader.missing(named := names_of(adapter))
            active = None if missing else self.store.acquire(adapter, ids)
            state = RequestState(
                request_id, text, ids, params, adapter, active, arrived, bad_words, self.tokenizer
            )
            try:
                self._core.add(state, self._inputs.start(state, number))
            except CapacityError:
                self.store.release(state.mix)
                raise
            self._loader.start(missing)
            self._loader.count(named, missing)
        return request_id

    @exclusive
    def abort(self, request_id: str) -> bool:
        """Ends a request; False if there is none.

        Its blocks and slot are free at once, or when the step that computes it now is done.
        """
        self._core.forget_told()
        state = self._core.requests.get(request_id) if isinstance(request_id, str) else None
        if state is None:
            return False
        with Change(self._core):
            self._core.abort(state)
        return True

    @exclusive
    def output(self, request_id: str) -> RequestOutput:
        """All that is known of a request, as `step` returned it last or will next.

        A RequestError when there is none of that id; a finished one is known until the next call.
        """
        state = self._core.requests.get(request_id) if isinstance(request_id, str) else None
        if state is None:
            raise RequestError(f"there is no request {shown(request_id)}")
        return state.output()

    @exclusive
    def step(self) -> list[RequestOutput]:
        """Computes one step and returns the requests that advanced, their outputs cumulative.

        With `async_scheduling` it starts a step and returns the result of the one before it.

        KeyboardInterrupt and SystemExit are raised, and the next step goes on as if they had not
        been. After any other exception within, what failed is computed again, alone if need be; a
        request that fails alone twice ends with finish_reason "error" and the reason in its
        output's `error`. Raises EngineDeadError if nothing runs any more.
        """
        self._core.forget_told()
        return self._core.step()

    @property
    @exclusive
    def request_ids(self) -> tuple[str, ...]:
        """The unfinished requests, in the order in which they came."""
        return self._core.unfinished

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return self._core.has_work

    # Adapters ---------------------------------------------------------------------------------

    @exclusive
    def load_adapter(self, name: str, path: str | Path) -> str:
        """Reads a PEFT folder, or fetches it first, and serves it as `name`; returns its digest.

        A loaded name is replaced: requests in flight finish on the version they began with. Raises
        AdapterInvalid, AdapterTooLarge or AdapterUnavailable; then nothing has changed. An adapter
        that brings weights of the base is compared with the base's checkpoint, or CheckpointError
        if that is gone.
        """
        return self._install(name, self.reader.read_folder(name, path))

    @exclusive
    def load_adapter_from_tensors(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> str:
        """Serves an adapter that lies in memory, such as a trainer's; returns its digest.

        `config` are the fields of a PEFT LoraConfig (its `to_dict()`), `tensors` by name what
        PEFT's `get_peft_model_state_dict` gives, on any device; they are copied. It is what
        `load_adapter` makes of the folder that `save_pretrained` writes, and raises the same.
        """
        return self._install(name, self.reader.read_tensors(name, config, tensors))

    @exclusive
    def install_adapter(self, name: str, found: LoadedAdapter) -> str:
        """Serves as `name` what `reader` has read, on any thread, beside the steps."""
        return self._install(name, found)

    def _install(self, name: str, found: LoadedAdapter) -> str:
        """Makes `name` mean what was packed; it stays on the host, whatever the bound."""
        with Change(self._core):
            self._loader.install(name, found)
            self._core.unpark()
        return found.digest

    @exclusive
    def has_adapter(self, name: str) -> bool:
        """Whether an adapter of this name is loaded or registered."""
        return isinstance(name, str) and self._loader.knows(name)

    @exclusive
    def adapter_path(self, name: str) -> str | None:
        """The folder or address that an adapter was loaded from, or is registered with.

        None for one that lay in memory, and where there is none of this name.
        """
        return self._loader.path(name) if isinstance(name, str) else None

    def adapter_chat_template(self, adapter: AdapterSpec) -> str | None:
        """The chat template that an adapter alone brings; None where the base's is to be used.

        That is with `adapter_chat_template="ignore"`, for the base and a mix, and for an adapter
        without a template of its own. One that has not been read yet is fetched, if it must be.
        Raises AdapterInvalid or AdapterUnavailable for a source that cannot be read.
        """
        found = self._template_source(adapter)
        return self.reader.chat_template(found) if isinstance(found, AdapterSource) else found

    @exclusive
    def _template_source(self, adapter: AdapterSpec) -> str | AdapterSource | None:
        names = names_of(_copied(adapter, "adapter"))
        if self.config.adapter_chat_template == "ignore" or len(names) != 1:
            return None
        return self._loader.chat_template(names[0])

    @exclusive
    def register_adapter(self, name: str, path: str | Path, *, digest: str | None = None) -> None:
        """Makes `name` mean the PEFT folder at `path`, which is read when a request names it.

        `path` may be an address (`hf://org/name@revision`, `s3://bucket/folder`, ...) that the
        setting adapter_sources allows: it is fetched then, into the cache on this machine.
        It may be dropped from host memory again, and is then read anew. With a `digest` it is
        refused where its content has another one. Replaces what the name meant: requests in flight
        finish on that, those that wait for a load get this. Raises AdapterError for a name that is
        not allowed.
        """
        check_name(name)
        if not isinstance(path, str | Path):
            raise AdapterInvalid(f"an adapter's folder must be a path, not {shown(path)}")
        check_digest(digest)
        self.reader.folders.check(path)
        with Change(self._core):
            self._loader.register(name, AdapterSource(path, digest))
            self._core.unpark()

    @exclusive
    def sync_adapters(self, path: str | Path) -> RegistryChanges:
        """Registers the adapters of an `adapters.toml`; says what changed.

        Call it again when the file has changed: what is as it was stays loaded, what another entry
        replaces is read anew, names that are in it no more are unloaded. Names that no file has
        brought are left alone. Raises ConfigError or AdapterInvalid; then nothing has changed.
        """
        if not isinstance(path, str | Path):
            raise ConfigError(f"a registry of adapters is a file's path, not {shown(path)}")
        wanted = read_registry(path)
        for name, source in wanted.items():
            try:
                self.reader.folders.check(source.path)
            except AdapterInvalid as error:
                raise AdapterInvalid(f"adapter {name!r} in {path}: {error}") from error
        with Change(self._core):
            changes = self._loader.sync(wanted)
            self._core.unpark()
        return changes

    @exclusive
    def unload_adapter(self, name: str) -> None:
        """Forgets a name, loaded or registered; requests in flight finish.

        Those that wait for it to be loaded end with an error. Raises AdapterNotFound.
        """
        if not isinstance(name, str):
            raise AdapterNotFound(f"no adapter is named {shown(name)}")
        with Change(self._core):
            if not self._loader.forget(name) or self.store.has(name):
                self.store.unload(name)
            self._core.unpark()
        return_freed_memory()

    @property
    @exclusive
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        return self.store.infos()

    @property
    @exclusive
    def registered_adapters(self) -> dict[str, RegisteredAdapter]:
        """The adapters that are read on demand, by name."""
        return self._loader.infos()

    @exclusive
    def reset_prefix_cache(self) -> bool:
        """Forgets all cached KV; False, and nothing done, while requests hold some of it."""
        if self.pool.num_free < self.pool.num_blocks:
            return False
        with Change(self._core):
            self.pool.forget()
        return True

    # Statistics -------------------------------------------------------------------------------

    @exclusive
    def memory(self) -> dict[str, int]:
        """Bytes in use: the base's weights, the adapters' rank pages, the KV blocks with tokens.

        Also what was set aside: for KV blocks, for the rank pages of the sites in layers, and, on a
        GPU, for the activations of the largest step.
        """
        used = self.pool.num_blocks - self.pool.num_free
        return {
            "base": self.model.num_bytes,
            "adapters": self.store.num_bytes,
            "kv": used * self._needs.block,
            "kv_capacity": self.pool.num_blocks * self._needs.block,
            "adapter_capacity": self._needs.rank_pages,
            "activations": self._needs.activations,
        }

    @property
    @exclusive
    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return EngineStats(
            self._core.num_steps,
            self.scheduler.num_prompt_tokens,
            self.scheduler.num_generated_tokens,
            self.scheduler.num_preemptions,
            len(self.scheduler.running),
            len(self.scheduler.waiting),
            len(self._compilations.late),
            self._loader.num_hits,
            self._loader.num_misses,
            self._loader.num_loads,
            self._loader.num_failures,
            self._loader.num_evictions,
        )

    @exclusive
    def check_integrity(self) -> None:
        """Asserts that all that requests hold adds up. For tests and for debugging."""
        self._core.check_integrity()


def _copied(given: _Given, name: str) -> _Given:
    """A mapping as a dict of our own: the caller's may change, or be anything."""
    return read(dict, given, name) if isinstance(given, Mapping) else given  # type: ignore[return-value]
