"""Any trace of an engine: nothing leaks, everything advances, and no answer changes.

A trace is what happens between steps, which are its clock: requests, aborts, adapters that come, go
and are replaced, loads that fail, and exceptions at any call within a step or a load. Each finished
answer is compared with the same request on an engine of its own, to the bit.

No other clock is needed: scheduling, sampling, engine and runtime never ask for the time, but to
say in the log how long a start took (`test_architecture.test_no_decision_asks_for_the_time`). The
patterns of an adapter alone have a time limit; those of these adapters are names.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from multilora.errors import AdapterError, AdapterInvalid, AdapterNotFound
from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import write_adapter
from tests.harness.failpoints import raised_at_call
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import Job, add, facts, make_engine, prompt_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from multilora.engine.engine import Engine
    from multilora.outputs import RequestOutput

# A file that an exception left open is closed by Python, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LONG = int(os.environ.get("MULTILORA_TRACES", 600))  # traces of the slow test; `make fuzz`
BATCH = 250  # traces of one run of hypothesis
MOST_STEPS = 5000  # from the last event of a trace to its end
ERRORS = (KeyboardInterrupt, MemoryError, OSError, AssertionError)
NAMES = ("x", "y", "z")
RANKS = (4, 8, 16, 24, 8)
ACTIVATED = 4  # the version that is an activated LoRA
REGISTERED = {f"r{version}": version for version in range(len(RANKS))}  # read on demand
PROMPTS = [prompt_of(length, seed=1) for length in (1, 9, 17, 40)]  # each begins the next
INVOCATION = PROMPTS[2][12:14]  # which the longer two have
# Little of everything: blocks run out, slots and pages are fought over, prompts come in chunks.
TIGHT = {
    "num_kv_blocks": 10,
    "block_size": 8,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "max_loras": 2,
    "lora_pages": 6,
    "max_host_adapter_bytes": 1,  # what nobody uses is dropped
}


@dataclass
class World:
    """A checkpoint, its adapters by version, and what each job gives on an engine of its own."""

    root: Path
    solo: dict[str, Any] = field(default_factory=dict)

    def alone(self, job: Job, loaded: dict[str, int]) -> Any:
        """The job's answer with the versions that its names had when it came."""
        names = [job.adapter] if isinstance(job.adapter, str) else list(job.adapter or ())
        key = repr((job, [(name, loaded[name]) for name in names]))
        if key not in self.solo:
            folders = {name: self.root / str(loaded[name]) for name in names}
            engine = make_engine(self.root / "base", folders, enforce_eager=True)
            self.solo[key] = facts(run(engine, [job])[0])
        return self.solo[key]

    def truncated(self, share: float) -> Path:
        """An adapter whose weights end too early."""
        folder = self.root / "truncated"
        shutil.copytree(self.root / "0", folder, dirs_exist_ok=True)
        weights = folder / "adapter_model.safetensors"
        content = (self.root / "0" / weights.name).read_bytes()
        weights.write_bytes(content[: int(share * len(content))])
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("fuzz")
    write_checkpoint(root / "base", num_layers=1)
    for version, rank in enumerate(RANKS):
        # v_proj: of one layer's projections only k and v make the cached KV another adapter's own.
        targets = ("v_proj", "down_proj", *(("lm_head",) if version == 2 else ()))
        config = replace(TINY, num_layers=1)
        folder = root / str(version)
        kind: dict[str, Any] = {"use_dora": version == 1, "lora_bias": version == 2}
        if version == 0:
            kind |= {"modules_to_save": ["norm", "lm_head"], "trainable_token_indices": [1, 2, 3]}
        if version == ACTIVATED:
            kind["alora_invocation_tokens"] = list(INVOCATION)
        write_adapter(folder, config, rank=rank, seed=version, scale=0.4, targets=targets, **kind)
    return World(root)


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 1.0)),
    seed=st.integers(0, 1),
    n=st.integers(1, 2),
    max_tokens=st.sampled_from((1, 8, 24)),
    ignore_eos=st.just(True),
    logprobs=st.just(2),
    prompt_logprobs=st.sampled_from((None, None, 1)),
)
WISH = st.tuples(st.sampled_from(PROMPTS), SAMPLING)
WHICH = st.integers(0, 59)  # of some few things
WEIGHTS = st.sampled_from((-0.5, 1.0))


class Life(RuleBasedStateMachine):
    """An engine's life, and what each request must come to."""

    def __init__(self, world: World, settings: dict[str, Any]) -> None:
        super().__init__()
        self.world = world
        self.engine: Engine = make_engine(world.root / "base", **TIGHT, **settings)
        self.loaded: dict[str, int] = {}
        for name, version in REGISTERED.items():
            self.engine.register_adapter(name, world.root / str(version))
        self.asked: dict[str, tuple[Job, dict[str, int]]] = {}
        self.finished: dict[str, RequestOutput] = {}

    @rule(name=st.sampled_from(NAMES), version=st.integers(0, len(RANKS) - 1))
    def load_or_replace(self, name: str, version: int) -> None:
        digest = self.engine.load_adapter(name, self.world.root / str(version))
        assert self.engine.adapters[name].digest == digest
        self.loaded[name] = version

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        if name in self.loaded:
            self.engine.unload_adapter(name)
            del self.loaded[name]
        else:
            with pytest.raises(AdapterNotFound):
                self.engine.unload_adapter(name)

    # What is drawn does not depend on the state: whether a load that was disturbed came to its end
    # may differ from one run to the next, and hypothesis wants the same draws then.
    @rule(wishes=st.lists(st.tuples(WISH, WHICH, WEIGHTS, WEIGHTS), min_size=1, max_size=4))
    def requests(self, wishes: list[tuple[Any, int, float, float]]) -> None:
        versions_of = self.loaded | REGISTERED
        names = sorted(versions_of)
        for (prompt, params), which, *weights in wishes:
            # Not of both kinds: who waits gets what a name means when the wait is over.
            pairs = [names[0:2], names[1:4:2], [*self.loaded][:2], [*self.loaded][:1]]
            mixes = [dict(zip(pair, weights, strict=False)) for pair in pairs]
            specs = [None, *names, *mixes]
            job = Job(prompt, params, specs[which % len(specs)])
            mixed = job.adapter if isinstance(job.adapter, dict) else {}
            versions = {versions_of[name] for name in mixed}
            if len(versions) > 1 and ACTIVATED in versions:
                continue  # it is an error, at once or when they are loaded
            self.asked[add(self.engine, job)] = (job, versions_of)
        for _, load in self.engine._loader._loads.values():
            load.exception()  # waits: what a step does must not depend on the clock

    @rule(name=st.sampled_from(NAMES))
    def request_of_an_unknown_adapter(self, name: str) -> None:
        if name not in self.loaded:
            with pytest.raises(AdapterNotFound):
                self.engine.add_request(PROMPTS[0], adapter=name)

    @precondition(lambda self: self.engine.has_work)
    @rule(which=WHICH)
    def abort(self, which: int) -> None:
        unfinished = sorted(self.asked.keys() - self.finished.keys())
        request = unfinished[which % len(unfinished)]
        assert self.engine.abort(request)
        del self.asked[request]

    @precondition(lambda self: self.engine.has_work)
    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take_step()
            self.engine.check_integrity()

    def take_step(self) -> None:
        for output in self.engine.step():
            assert output.request_id in self.asked
            assert output.error is None
            if output.finished:
                assert output.request_id not in self.finished, "told twice"
                self.finished[output.request_id] = output

    @precondition(lambda self: self.engine.has_work)
    @rule(number=st.integers(0, 1500), error=st.sampled_from(ERRORS))
    def step_that_raises_within(self, number: int, error: type[BaseException]) -> None:
        raised_at_call(number, error("planted"), self.take_step)
        # A request that fails alone a second time would rightly end with an error, and the engine
        # with the third failure in a row of which no request is the cause.
        core = self.engine._core
        for _ in range(MOST_STEPS):
            is_over = core._isolation.members is None and not core._num_unexplained
            if is_over or not self.engine.has_work:
                break
            self.take_step()

    @rule(
        name=st.sampled_from(NAMES),
        version=st.integers(0, len(RANKS) - 1),
        number=st.integers(0, 600),
        error=st.sampled_from(ERRORS),
    )
    def load_that_raises_within(
        self, name: str, version: int, number: int, error: type[BaseException]
    ) -> None:
        folder = self.world.root / str(version)
        before = self.engine.adapters.get(name)
        with suppress(AdapterError):  # what was planted may be told as an unreadable file
            raised_at_call(number, error("planted"), lambda: self.engine.load_adapter(name, folder))
        after = self.engine.adapters.get(name)
        if after is not None and after != before:
            self.loaded[name] = version

    @rule(name=st.sampled_from(NAMES), share=st.floats(0, 0.99))
    def load_of_a_truncated_file(self, name: str, share: float) -> None:
        before = self.engine.adapters
        with pytest.raises(AdapterInvalid):
            self.engine.load_adapter(name, self.world.truncated(share))
        assert self.engine.adapters == before

    @invariant()
    def all_adds_up(self) -> None:
        self.engine.check_integrity()
        assert set(self.engine.adapters) - set(REGISTERED) == set(self.loaded)
        assert self.engine.has_work == (self.asked.keys() != self.finished.keys())

    def teardown(self) -> None:
        for _ in range(MOST_STEPS):
            if not self.engine.has_work:
                break
            self.take_step()
        assert not self.engine.has_work, "it does not advance"
        assert self.finished.keys() == self.asked.keys()
        for request, (job, loaded) in self.asked.items():
            assert facts(self.finished[request]) == self.world.alone(job, loaded)
        for name in self.loaded:
            self.engine.unload_adapter(name)
        self.engine.check_integrity()
        assert self.engine.memory()["kv"] == 0


# How an engine can work; its answers are the same in all of them.
WAYS = {
    "plain": {"enforce_eager": True},
    "graphs": {},
    "async, graphs": {"async_scheduling": True},
}
every_way = pytest.mark.parametrize("way", WAYS)


def live(world: World, way: str, examples: int, steps: int) -> None:
    # pytest keeps each record of a failed step, and with it the frames, and with them the engine.
    logging.disable(logging.CRITICAL)
    try:
        _live(world, way, examples, steps)
    finally:
        logging.disable(logging.NOTSET)


def _live(world: World, way: str, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: Life(world, WAYS[way]),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@every_way
def test_a_short_life_leaks_nothing_and_changes_no_answer(world: World, way: str) -> None:
    live(world, way, examples=100 if way == "plain" else 50, steps=20)


@pytest.mark.slow
@every_way
def test_a_long_life_leaks_nothing_and_changes_no_answer(world: World, way: str) -> None:
    count = LONG // 2 if way == "plain" else LONG // 4
    for done in range(0, count, BATCH):  # hypothesis remembers every trace of a run
        with suppress(FlakyStrategyDefinition):  # which rules may come next depends on the state
            live(world, way, examples=min(count - done, BATCH), steps=40)
        world.solo.clear()
        print(f"{way}: {min(done + BATCH, count)} of {count} traces", flush=True)  # noqa: T201 - with pytest -s
