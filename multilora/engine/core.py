"""Steps, and what is left when one fails: nothing but requests that were at fault themselves.

Whatever is raised, at any point, what lasts is enough to go on: the requests, the tokens of their
sequences, the adapters' names and complete pages, and the published KV blocks. While anything else
changes the core is torn; `recover` throws all of it away and makes it anew.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable
from typing import NoReturn, TypeVar

from ..adapters.loader import AdapterLoader
from ..adapters.mix import names_of
from ..adapters.store import AdapterStore
from ..errors import EngineDeadError, MultiloraError
from ..outputs import FinishReason, RequestOutput
from ..runtime.model_runner import ModelRunner, StepHandle
from ..scheduling.block_pool import BlockPool
from ..scheduling.scheduler import Scheduler
from ..scheduling.sequence import Sequence
from .failures import FailureIsolation
from .output_processor import CompletionState, RequestState

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
FRAMES = 200  # of Python's stack: more than a step needs
MAX_WAIT = 0.001  # seconds that a step waits for a load when there is nothing to compute
MAX_UNEXPLAINED = 3  # failures in a row for which no request can be blamed


def reason_of(error: BaseException) -> str:
    """What an error says, in a line; its class may be a caller's."""
    try:
        return f"{type(error).__name__}: {error}"[:1000]
    except Exception:
        return type(error).__name__


def is_callers(error: BaseException) -> bool:
    """Whether it says no more than that the caller has left too little of Python's stack."""
    if not isinstance(error, RecursionError):
        return False
    frame, depth = sys._getframe(), FRAMES
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth > sys.getrecursionlimit()


class EngineCore:
    """The requests of an engine and the steps that compute them."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: BlockPool,
        store: AdapterStore,
        loader: AdapterLoader,
        runner: ModelRunner,
        depth: int,  # steps in flight
        clock: Callable[[], float],  # seconds
    ) -> None:
        self.scheduler, self.pool, self.store, self.runner = scheduler, pool, store, runner
        self.loader = loader
        self.requests: dict[str, RequestState] = {}
        self.is_torn = False
        self.dead: str | None = None  # why nothing runs any more
        self.num_steps = 0
        self._depth, self._clock = depth, clock
        self._handles: deque[StepHandle] = deque()
        self._by_seq: dict[int, RequestState] = {}  # the sequences that have not ended
        self._parked: dict[str, RequestState] = {}  # whose adapters are being loaded
        self._was_rebuilt = False  # since they were looked at: a load may be over, or not begun
        self.news: dict[str, RequestState] = {}  # what the next step tells
        self._due: dict[str, RequestState] = {}  # of the news, those whose callers want them now
        self.telling: dict[str, RequestState] | None = None  # what the last call has told
        self.told: tuple[str, ...] = ()  # requests that finished, and were returned
        self._isolation = FailureIsolation()
        self._num_unexplained = 0

    @property
    def unfinished(self) -> tuple[str, ...]:
        """The requests that have not been told to be finished, in the order in which they came."""
        return tuple(i for i in self.requests if i not in self.told)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        # An interrupted `forget_told` may have dropped some of them.
        return len(self.requests) > sum(i in self.requests for i in self.told)

    def add(self, state: RequestState, seqs: list[Sequence]) -> None:
        """Queues a request; a CapacityError if it could never run.

        It holds its adapters, or is parked until they are loaded.
        """
        if state.is_parked:
            self.scheduler.check(*seqs)
            self._parked[state.request_id] = state
        else:
            self.scheduler.add(*seqs)
        self._by_seq |= {seq.seq_id: state for seq in seqs}
        self.requests[state.request_id] = state

    def abort(self, state: RequestState) -> None:
        """Ends a request."""
        del self.requests[state.request_id]  # from here on it is gone, whatever is raised
        self.news.pop(state.request_id, None)
        for answer in state.answers:
            self.scheduler.abort(answer.seq)
            self._drop(answer.seq)
        if self._parked.pop(state.request_id, None) is not None:
            self.loader.drop_unwanted(self._wanted())
        self._attempt(self._drain_idle)

    def step(self) -> list[RequestOutput]:
        """See `Engine.step`."""
        self.is_torn = True
        found = self._attempt(self._compute)
        if found is None:  # what there is to tell, the next step tells
            self.is_torn = False
            return []
        # From here on it counts as told: nothing is called any more before it is returned.
        outputs, self.told = found
        self.telling, self.news, self.is_torn = self._due, {}, False
        return outputs

    def _compute(self) -> tuple[list[RequestOutput], tuple[str, ...]]:
        """Makes a step; what there is to tell, and which requests that ends."""
        if self.loader.has_news or (self._parked and self._was_rebuilt):
            self.unpark()
        self._advance()
        self._due = {i: state for i, state in self.news.items() if state.is_due()}
        outputs = [state.tell() for state in self._due.values()]
        self._num_unexplained = 0
        return outputs, tuple(output.request_id for output in outputs if output.finished)

    def was_told(self) -> None:
        """What the last call told has reached its caller."""
        for state in (self.telling or {}).values():
            state.was_told()
        self.telling = None

    def forget_told(self) -> None:
        """Drops the requests that were returned finished: the caller knows of them."""
        for request_id in self.told:
            self.requests.pop(request_id, None)
        self.told = ()

    def check_integrity(self) -> None:
        """Asserts that all that requests hold adds up."""
        scheduler, requests = self.scheduler, self.requests.values()
        scheduler.check_integrity()
        assert scheduler.num_in_flight == len(self._handles), "steps in flight differ"
        everyone = (*scheduler.running, *scheduler.waiting)
        parked = [seq for state in requests if state.is_parked for seq in state.unfinished]
        assert {s.request_id for s in requests if s.is_parked} == self._parked.keys(), "parked"
        alive = {seq.seq_id for seq in (*everyone, *parked) if seq.finish_reason is None}
        unfinished = {seq.seq_id for state in requests for seq in state.unfinished}
        assert alive == unfinished == set(self._by_seq), "sequences differ"
        self.store.check_integrity(
            pins=[seq.mix for seq in scheduler.running],
            holds=[state.mix for state in requests if state.unfinished],
        )
        self.runner.check_integrity(
            [s.request_slot for s in scheduler.running if s.request_slot is not None]
        )

    # Loads ------------------------------------------------------------------------------------

    def unpark(self) -> None:
        """Takes in what was loaded; parked requests go on, or end if there is no hope for them."""
        self.loader.take_in(self._wanted())
        for state in list(self._parked.values()):
            try:
                missing = self.loader.missing(names_of(state.adapter))
                if missing:
                    self.loader.start(missing)
                    continue
                active = self.store.acquire(state.adapter, state.prompt_ids)
            except MultiloraError as error:
                for answer in state.answers:
                    self.scheduler.fail(answer.seq, str(error))
                    self._take_in(state, answer.seq.index)
            else:
                state.activate(active, self._clock())
                self.scheduler.add(*(answer.seq for answer in state.answers))
            del self._parked[state.request_id]
        self._was_rebuilt = False

    def _wanted(self) -> set[str]:
        """The adapters that parked requests name."""
        return {name for state in self._parked.values() for name in names_of(state.adapter)}

    # A step -----------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Schedules and submits a step, and takes in the oldest one in flight."""
        if self._isolation.settle(self._position):
            tokens = self.scheduler.halve_budget()
            logger.warning(
                "a step failed twice that its halves did not: from now on steps have at most %d "
                "tokens; start with a smaller max_num_batched_tokens or max_num_seqs",
                tokens,
            )
        members = self._isolation.members
        output = self.scheduler.schedule(members)
        if output is None and members is not None:
            self._isolation.release()  # those that failed cannot run alone: all go on
            output = self.scheduler.schedule()
        if output is not None:
            if output.new_sequences:
                self._mark_scheduled()
            self._handles.append(self.runner.submit(output))
        depth = self._depth if members is None else 1  # what fails must be one step
        if self._handles and (output is None or len(self._handles) >= depth):
            self._finish_step()
            self._drain_idle()
        elif output is None and self.loader.is_busy:
            self.loader.wait(MAX_WAIT)  # nothing else is to be done

    def _mark_scheduled(self) -> None:
        now = self._clock()
        for seq in self.scheduler.running:
            if (state := self._by_seq.get(seq.seq_id)) is not None:
                state.mark_scheduled(now)

    def _finish_step(self) -> None:
        """Waits for the oldest step in flight, and takes in its result."""
        handle = self._handles[0]
        result = self.runner.collect(handle)
        self.num_steps += 1
        advanced = self.scheduler.update(handle.scheduler_output, result)
        self._handles.popleft()
        for seq in advanced:
            self._take_in(self._by_seq[seq.seq_id], seq.index)

    def _drain_idle(self) -> None:
        """Ends the steps that were started for requests which have all ended by now."""
        while self._handles and not self._by_seq:
            self._finish_step()

    def _take_in(self, state: RequestState, index: int) -> None:
        """Takes in what is new of an answer, to be told by this step."""
        answer, seq = state.answers[index], state.answers[index].seq
        self.news[state.request_id] = state
        state.mark_token(self._clock())
        answer.advance()
        if answer.stop is not None and seq.finish_reason in (None, FinishReason.LENGTH):
            self.scheduler.finish(seq, FinishReason.STOP, answer.stop)
            answer.advance()
        if seq.finish_reason is FinishReason.ERROR and seq.seq_id in self._by_seq:
            logger.warning("request %s ends with an error: %s", state.request_id, seq.error)
        if seq.finish_reason is not None:
            self._drop(seq)

    def _drop(self, seq: Sequence) -> None:
        """Forgets a sequence that has ended; with a request's last one go its adapters."""
        state = self._by_seq.pop(seq.seq_id, None)
        if state is None:
            return
        if not any(answer.seq.seq_id in self._by_seq for answer in state.answers):
            self.store.release(state.mix)
            if self.loader.is_over:
                self.loader.make_room(self._wanted())

    def _position(self, seq_id: int) -> int | None:
        """Tokens computed of an unfinished sequence."""
        state = self._by_seq.get(seq_id)
        seqs = [] if state is None else state.unfinished
        return next((seq.num_computed for seq in seqs if seq.seq_id == seq_id), None)

    # Failures ---------------------------------------------------------------------------------

    def _attempt(self, work: Callable[[], _Result]) -> _Result | None:
        """Does the work; None if it raised: of that nothing is left but failed requests."""
        try:
            return work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if is_callers(error):
                raise
            self._after(error)
            return None

    def _after(self, error: BaseException) -> None:
        """Recovers from a failed step, and sees to it that its requests are tried again."""
        reason = reason_of(error)
        involved = self.scheduler.involved()
        num_failed = self.recover()
        self.is_torn = True  # there is more to come
        logger.warning("a step failed and is tried again: %s", reason, exc_info=error)
        if not involved:
            self._num_unexplained += 0 if num_failed else 1
            if self._num_unexplained >= MAX_UNEXPLAINED:
                self._die(reason)
            return
        for seq_id in self._isolation.failed(involved):
            self._check_health()
            state = self._by_seq[seq_id]
            seq = next(seq for seq in state.unfinished if seq.seq_id == seq_id)
            self.scheduler.fail(seq, f"it cannot be computed: {reason}")
            self._take_in(state, seq.index)

    def _check_health(self) -> None:
        """Whether anything runs at all, now that a request has failed for good."""
        try:
            self.runner.check_health()
        except Exception:  # what holds fails twice
            try:
                self.runner.check_health()
            except Exception as error:
                self._die(reason_of(error))

    def _die(self, reason: str) -> NoReturn:
        self.dead = f"the engine cannot compute any more ({reason}); make a new one"
        logger.error(self.dead)
        raise EngineDeadError(self.dead)

    def recover(self) -> int:
        """Makes everything anew from what lasts; how many answers failed meanwhile."""
        for _ in range(MAX_UNEXPLAINED):
            try:
                return self._rebuild()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                if is_callers(error):
                    raise
                logger.warning("a recovery failed", exc_info=error)
                reason = reason_of(error)
        self._die(reason)

    def _rebuild(self) -> int:
        """One attempt to. Idempotent: it may be raised out of anywhere, and called again."""
        self.is_torn = True
        self._handles.clear()
        self.runner.reset()
        self.forget_told()
        requests = self.requests
        self.news = {i: state for i, state in self.news.items() if i in requests}
        # Those that have ended are among them until they are told.
        self._by_seq = {
            answer.seq.seq_id: state
            for state in requests.values()
            for answer in state.answers
            if answer.seq.finish_reason is None or answer.is_behind
        }
        held = {id(state): state.mix for state in self._by_seq.values()}
        self.store.reset(list(held.values()))
        self.pool.reset()
        self._parked = {i: state for i, state in requests.items() if state.is_parked}
        self._was_rebuilt = True
        known = (state for state in requests.values() if not state.is_parked)
        self.scheduler.reset([answer.seq for state in known for answer in state.answers])
        num_failed = 0
        for state in requests.values():
            num_failed += sum(self._catch_up(state, answer) for answer in state.answers)
        self.is_torn = False
        return num_failed

    def _catch_up(self, state: RequestState, answer: CompletionState) -> bool:
        """Takes in what a step left behind; True if the answer's text itself cannot be made."""
        if not answer.is_behind:
            return False
        for is_last in (False, True):  # what fails twice is its own fault
            try:
                self._take_in(state, answer.seq.index)
                return False
            except Exception as error:
                if is_last:
                    logger.warning("request %s has no text", state.request_id, exc_info=error)
                    reason = reason_of(error)
        answer.give_up()
        self.scheduler.fail(answer.seq, f"its text cannot be made: {reason}")
        self._take_in(state, answer.seq.index)
        return True
