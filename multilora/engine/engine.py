"""The engine: requests in, one step at a time, outputs back. No threads, no asyncio, no HTTP."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path

from ..adapters.mix import mix_identity
from ..adapters.peft.reader import read_adapter
from ..adapters.store import AdapterInfo
from ..checkpoint.reader import read_base_weight
from ..config.engine import EngineConfig
from ..errors import CapacityError, RequestError
from ..outputs import FinishReason, RequestOutput
from ..runtime.model_runner import StepHandle
from ..sampling_params import SamplingParams
from ..scheduling.block_pool import BlockPool
from ..scheduling.scheduler import Scheduler
from ..scheduling.scheduler_output import SchedulerOutput, StepResult
from ..scheduling.sequence import Sequence
from .builder import build
from .output_processor import RequestState

Adapter = str | Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine was made."""

    steps: int
    prompt_tokens: int  # computed, so without those taken from the prefix cache
    generated_tokens: int
    preemptions: int
    running: int
    waiting: int


class Engine:
    """Serves one base model and any number of adapters, step by step.

    Raises ConfigError, CheckpointError or TokenizerError if it cannot be made.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        parts = build(config)
        self.model_config, self.model, self.tokenizer = (
            parts.model_config,
            parts.model,
            parts.tokenizer,
        )
        self.store, self.runner, self.max_model_len = parts.store, parts.runner, parts.max_model_len
        self._needs = parts.needs
        self.pool = BlockPool(
            self.runner.cache.num_blocks, config.block_size, config.enable_prefix_caching
        )
        self.scheduler = Scheduler(config, self.pool, self.store, self.max_model_len)
        self._depth = 2 if config.is_async(parts.device.is_cuda) else 1  # steps on their way
        self._tickets: deque[StepHandle] = deque()
        self._requests: dict[str, RequestState] = {}
        self._by_seq: dict[int, RequestState] = {}
        self._seq_ids, self._arrivals = itertools.count(), itertools.count()
        self._steps = self._prompt_tokens = self._generated = 0

    def add_request(
        self,
        prompt: str | Ids[int],
        params: SamplingParams | None = None,
        *,
        adapter: Adapter = None,
        request_id: str | None = None,
    ) -> str:
        """Queues a request and returns its id.

        `adapter` is a loaded adapter's name, a mapping of names to weights, or None for the base.
        Raises RequestError, AdapterNotFound or CapacityError; then nothing has changed.
        """
        params = params if params is not None else SamplingParams()
        number = next(self._arrivals)
        request_id = request_id if request_id is not None else f"request-{number}"
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; give another or none")
        ids = self._prompt_ids(prompt)
        self._check_ids(ids, params)
        mix = self.store.resolve(adapter)
        text = prompt if isinstance(prompt, str) else None
        state = RequestState(request_id, text, ids, params, adapter, mix)
        try:
            for index in range(params.n):
                seq = self._sequence(state, index, number)
                self.scheduler.add(seq)
                self.store.hold(mix)
                state.start(seq, self.tokenizer)
                self._by_seq[seq.seq_id] = state
        except CapacityError:
            for answer in state.answers:
                self._drop(answer.seq)
            raise
        self._requests[request_id] = state
        return request_id

    def abort(self, request_id: str) -> bool:
        """Ends a request; False if there is none.

        Its blocks and slot are free at once, or when the step that computes it now is done.
        """
        state = self._requests.pop(request_id, None)
        if state is None:
            return False
        for answer in state.answers:
            if answer.seq.finish_reason is None:
                self._drop(answer.seq)
        self._drain_idle()
        return True

    def step(self) -> list[RequestOutput]:
        """Computes one step and returns the requests that advanced, their outputs cumulative.

        With `async_scheduling` it starts a step and returns what came of the one before it.
        """
        plan = self.scheduler.schedule()
        if plan is not None:
            self._tickets.append(self.runner.submit(plan))
        if not self._tickets or (plan is not None and len(self._tickets) < self._depth):
            return []
        outputs = self._finish_step()
        self._drain_idle()
        return outputs

    def _finish_step(self) -> list[RequestOutput]:
        """Waits for the oldest step on its way, and takes in what came of it."""
        ticket = self._tickets.popleft()
        plan, result = ticket.plan, self.runner.collect(ticket)
        touched = self._record(plan, result)
        for seq in self.scheduler.update(plan, result):
            state = self._by_seq[seq.seq_id]
            touched[state.request_id] = state
            stop = state.advance(seq)
            if stop is not None and seq.finish_reason in (None, FinishReason.LENGTH):
                if seq.finish_reason is None:
                    self.scheduler.finish(seq, FinishReason.STOP, stop)
                seq.finish_reason, seq.stop_reason = FinishReason.STOP, stop
            if seq.finish_reason is not None:
                self._forget(seq)
        outputs = [state.output() for state in touched.values()]
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs

    def _drain_idle(self) -> None:
        """Ends the steps that were started for requests which have all ended by now."""
        while self._tickets and not self._requests:
            self._finish_step()

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The unfinished requests, in the order in which they came."""
        return tuple(self._requests)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def load_adapter(self, name: str, path: str | Path) -> str:
        """Reads a PEFT folder and serves it as `name`; returns its digest.

        A loaded name is replaced: requests in flight finish on the version they began with. Raises
        AdapterInvalid or AdapterTooLarge; then nothing has changed. An adapter that brings weights
        of the base is compared with the base's checkpoint, or CheckpointError if that is gone.
        """
        adapter = read_adapter(path, self.model_config, max_rank=self.config.max_lora_rank)
        base = {
            site: read_base_weight(self.config.model, site, self.model_config)
            for site in adapter.base_weights
        }
        return self.store.load(name, adapter, base=base)

    def unload_adapter(self, name: str) -> None:
        """Forgets a name; requests in flight finish. Raises AdapterNotFound."""
        self.store.unload(name)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        return self.store.infos()

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
    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return EngineStats(
            self._steps,
            self._prompt_tokens,
            self._generated,
            self.scheduler.num_preemptions,
            len(self.scheduler.running),
            len(self.scheduler.waiting),
        )

    def check_integrity(self) -> None:
        """Asserts that blocks, slots, rows and pages add up. For tests and for debugging."""
        self.scheduler.check_integrity()
        self.store.check_integrity()
        everyone = (*self.scheduler.running, *self.scheduler.waiting)
        alive = {seq.seq_id for seq in everyone if seq.finish_reason is None}
        assert alive == set(self._by_seq), "sequences of the scheduler and the engine differ"

    def _record(self, plan: SchedulerOutput, result: StepResult) -> dict[str, RequestState]:
        """Keeps the logprobs of a step; returns the requests that got prompt logprobs."""
        self._steps += 1
        touched = {}
        for chunk, row in zip(plan.chunks, result.rows, strict=True):
            seq = self.scheduler.sequence(chunk.row)
            if seq.finish_reason is not None:  # while it was computed
                continue
            self._generated += row.token is not None
            self._prompt_tokens += chunk.count - (row.token is not None)
            state = self._by_seq[seq.seq_id]
            if state.keep_logprobs(seq, row):
                touched[state.request_id] = state
        return touched

    def _sequence(self, state: RequestState, index: int, arrival: int) -> Sequence:
        """Answer `index` of a request, as yet unknown to the scheduler."""
        params, ids, limit = state.params, state.prompt_ids, self.max_model_len
        seed = params.seed if params.seed is not None else _seed(self.config.seed, arrival)
        total = limit if params.max_tokens is None else min(limit, len(ids) + params.max_tokens)
        return Sequence(
            seq_id=next(self._seq_ids),
            request_id=state.request_id,
            index=index,
            params=params,
            prompt_ids=ids,
            mix=state.mix,
            identity=mix_identity(state.mix),
            seed=seed + index,
            arrival=arrival,
            max_total=total,
            stop_ids=self._stop_ids(params),
        )

    def _drop(self, seq: Sequence) -> None:
        self.scheduler.abort(seq)
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        del self._by_seq[seq.seq_id]
        self.store.release(seq.mix)

    def _prompt_ids(self, prompt: str | Ids[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "skip_tokenizer_init=True serves token ids only; give a list of ids"
                )
            return self.tokenizer.encode(prompt)
        return list(prompt)

    def _check_ids(self, ids: list[int], params: SamplingParams) -> None:
        vocab = self.model_config.vocab_size
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        named = {
            "prompt": ids,
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": list(params.logit_bias or ()),
        }
        for name, values in named.items():
            for token in values:
                if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
                    raise RequestError(
                        f"{name}: {token!r} is not a token id of this model (0..{vocab - 1})"
                    )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        if self.tokenizer is not None and not params.ignore_eos:
            eos = (*eos, *self.tokenizer.eos_token_ids)
        return frozenset(params.stop_token_ids) | frozenset(eos)


def _seed(base: int, number: int) -> int:
    """A seed for request `number`, unlike its neighbours'."""
    digest = hashlib.sha256(f"{base}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
