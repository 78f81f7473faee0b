"""The engine for asyncio: one thread steps it, and any number of coroutines read its streams."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Ids
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from ..adapters.loader import LoadedAdapter, RegisteredAdapter, be_nice
from ..adapters.mix import AdapterSpec
from ..adapters.store import AdapterInfo
from ..arguments import is_int, is_number, plain
from ..checkpoint.generation_config import sampling_defaults
from ..config.engine import EngineConfig
from ..engine.engine import Engine
from ..engine.stats import EngineStats
from ..errors import ConfigError, RequestError, shown
from ..lora_request import LoRARequest
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from .engine_thread import EngineThread
from .stream import Stream

_Result = TypeVar("_Result")
MAX_WAITING = 4096  # requests, unless their server says otherwise
LOOK = 0.005  # seconds between two looks of `drain`


class AsyncEngine:
    """Serves one base model and any number of adapters to coroutines, in any event loops.

    `async with AsyncEngine(config) as engine` shuts it down at the end. Making one reads the model,
    which takes a while: do it before there are clients. Whatever is awaited raises EngineDeadError
    once nothing runs any more, EngineClosedError when it was shut down, and EngineBusyError in a
    fork.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        resolver: Callable[[str], str | Path | None] | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Beyond the `max_num_seqs` that run, `max_waiting` requests may wait.

        The others are as for `Engine`.
        """
        if not is_int(limit := plain(max_waiting)) or limit < 0:
            raise ConfigError(f"max_waiting must be a count, 0 or more, not {shown(max_waiting)}")
        engine = Engine(config, resolver=resolver)
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self.model_config, self.max_model_len = engine.model_config, engine.max_model_len
        is_plain = config.generation_config == "vllm"
        self._default = SamplingParams(**({} if is_plain else sampling_defaults(config.model)))
        self._reader = engine.reader
        self._readers = ThreadPoolExecutor(1, "multilora-reader", initializer=be_nice)
        self._thread = EngineThread(engine, config.max_num_seqs + limit)
        # Also at the interpreter's end, which would stop the thread amid a step.
        self._finalizer = weakref.finalize(self, self._thread.join)

    # Requests ---------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str | Ids[int] | Mapping[str, Any],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        adapter: AdapterSpec = None,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers a prompt; yields outputs as `SamplingParams.output_kind` says, the last finished.

        Prompt, adapter and id are as for `Engine.add_request`; without parameters
        `get_default_sampling_params()` holds. The folder of a `lora_request` is registered under
        its name, unless it is by now, and read beside the steps. Who reads slowly gets what has
        come meanwhile as one output. When the reader stops (it leaves the loop, is cancelled, or
        its event loop is closed), the request ends within two steps.

        The first output raises what `Engine.add_request` raises, EngineFullError where too many
        wait, and EngineClosedError while the engine drains. What a request itself is at fault for
        later is told in its last output, by finish_reason "error" and `error`.
        """
        params = self._default if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, not {shown(params)}")
        if lora_request is not None:
            if not isinstance(lora_request, LoRARequest):
                raise RequestError(f"lora_request must be a LoRARequest, not {shown(lora_request)}")
            if adapter is not None:
                raise RequestError("give adapter or lora_request, not both")

        def start(engine: Engine) -> str:
            spec = adapter if lora_request is None else self._registered(engine, lora_request)
            return engine.add_request(prompt, params, adapter=spec, request_id=request_id)

        stream = Stream(start, params.output_kind)
        self._thread.open(stream)
        try:
            while True:
                output = await stream.next()
                yield output if lora_request is None else replace(output, lora_request=lora_request)
                if output.finished:
                    return
        finally:
            self._thread.leave(stream)

    async def abort(self, request_id: str) -> bool:
        """Ends a request; False if there is none.

        Its stream ends with what it has not told yet and finish_reason "abort".
        """
        return await self.call(lambda _: self._thread.abort(request_id))

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where no parameters are given: those of the model's generation_config.json."""
        return self._default

    # Adapters ---------------------------------------------------------------------------------

    async def load_adapter(self, name: str, path: str | Path) -> str:
        """Serves a PEFT folder as `name`, which is replaced if loaded; returns its digest.

        It is read beside the steps. Requests in flight finish on the version that they began with.
        Raises what `Engine.load_adapter` does.
        """
        return await self._load(name, partial(self._reader.read_folder, name, path))

    async def load_adapter_from_tensors(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> str:
        """Serves an adapter that lies in memory; see `Engine.load_adapter_from_tensors`.

        The tensors are copied beside the steps and must not change before it returns.
        """
        return await self._load(name, partial(self._reader.read_tensors, name, config, tensors))

    async def _load(self, name: str, read: Callable[[], LoadedAdapter]) -> str:
        def read_now() -> LoadedAdapter:
            self._thread.check()  # it may have been shut down since
            return read()

        self._thread.check()
        found = await asyncio.get_running_loop().run_in_executor(self._readers, read_now)
        return await self.call(lambda engine: engine.install_adapter(name, found))

    async def register_adapter(
        self, name: str, path: str | Path, *, digest: str | None = None
    ) -> None:
        """Makes `name` mean a folder that is read when a request names it; see `Engine`."""
        await self.call(lambda engine: engine.register_adapter(name, path, digest=digest))

    async def unload_adapter(self, name: str) -> None:
        """Forgets a name, loaded or registered; requests in flight finish.

        Those that wait for it to be read end with an error. Raises AdapterNotFound.
        """
        await self.call(lambda engine: engine.unload_adapter(name))

    async def list_adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        return await self.call(lambda engine: engine.adapters)

    async def list_registered_adapters(self) -> dict[str, RegisteredAdapter]:
        """The adapters that are read on demand, by name."""
        return await self.call(lambda engine: engine.registered_adapters)

    @staticmethod
    def _registered(engine: Engine, request: LoRARequest) -> str:
        """The name of its adapter, which means its folder from here on."""
        name, path = request.lora_name, request.lora_path
        if request.load_inplace or engine.adapter_path(name) != path:
            engine.register_adapter(name, path)
        return name

    # The engine -------------------------------------------------------------------------------

    async def call(self, function: Callable[[Engine], _Result]) -> _Result:
        """What `function(engine)` gives, called between two steps, on the engine's thread.

        While it runs all streams wait. Requests of `generate` are ended by `abort`, not there.
        """
        found: _Result = await asyncio.wrap_future(self._thread.submit(function))
        return found

    async def get_stats(self) -> EngineStats:
        """What the engine has done so far."""
        return await self.call(lambda engine: engine.stats)

    @property
    def num_requests(self) -> int:
        """Requests that were taken and have not ended, those that wait among them."""
        return self._thread.num_requests

    async def check_health(self) -> None:
        """Raises why requests are not taken: it is dead, drained or shut down. Does not wait."""
        self._thread.check(is_request=True)

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those that there are; False if time was too short.

        Those that are left go on; `shutdown` ends them.
        """
        if timeout is not None and not is_number(timeout := plain(timeout)):
            raise RequestError(f"timeout must be seconds or None, not {shown(timeout)}")
        self._thread.check()
        self._thread.drain()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while self._thread.num_requests:
            if timeout is not None and loop.time() - begin >= timeout:
                return False
            await asyncio.sleep(LOOK)
        self._thread.check()
        return True

    async def shutdown(self) -> None:
        """Ends the thread after the step that it is in; whoever waits gets an EngineClosedError.

        What has been told before can still be read. May be called again.
        """
        self._thread.stop()
        await asyncio.shield(asyncio.wrap_future(self._thread.ended))
        self._readers.shutdown(wait=False)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.shutdown()
