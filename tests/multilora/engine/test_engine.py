"""The engine from outside: requests in, outputs back, nothing left behind by what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from multilora.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    CapacityError,
    ConfigError,
    RequestError,
)
from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import change_tensors, write_adapter
from tests.harness.model_folders import TINY
from tests.harness.tiny_engines import Job, add, drain, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from multilora.engine.engine import Engine

PROMPT = prompt_of(20)


def tokens(engine: Engine, adapter: Any = None, **fields: Any) -> list[int]:
    return run(engine, [Job(PROMPT, greedy(**fields), adapter)])[0].outputs[0].token_ids


def test_a_step_without_work_does_nothing(engine: Engine) -> None:
    assert not engine.has_work
    assert engine.step() == []
    assert engine.stats.steps == 0


def test_an_aborted_request_gives_all_back_and_its_neighbour_stays(engine: Engine) -> None:
    alone, _ = tokens(engine, "a"), tokens(engine, "b")
    before = engine.memory()
    doomed = engine.add_request(prompt_of(50, seed=9), greedy(50, n=2), adapter="b")
    kept = engine.add_request(PROMPT, greedy(), adapter="a")
    engine.step()
    assert engine.abort(doomed)
    engine.check_integrity()
    assert not engine.abort(doomed)
    assert drain(engine)[kept].outputs[0].token_ids == alone
    assert engine.memory() == before


def test_a_waiting_request_can_be_aborted(root: Path) -> None:
    engine = make_engine(root / "base", max_num_seqs=1)
    first, second = add(engine, Job(PROMPT, greedy())), add(engine, Job(PROMPT, greedy()))
    engine.step()
    assert engine.abort(second)
    assert set(drain(engine)) == {first}


@pytest.mark.parametrize("count", [1, 7])
def test_max_tokens_ends_an_answer(engine: Engine, count: int) -> None:
    assert len(tokens(engine, max_tokens=count)) == count


def test_a_stop_id_ends_an_answer_but_not_before_min_tokens(engine: Engine) -> None:
    free = tokens(engine, max_tokens=12)
    stop = free[3]
    first = free.index(stop)
    job = Job(PROMPT, greedy(12, stop_token_ids=(stop,)))
    output = run(engine, [job])[0].outputs[0]
    assert output.token_ids == free[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    late = tokens(engine, max_tokens=12, stop_token_ids=(stop,), min_tokens=first + 3)
    assert stop not in late[: first + 2]
    assert len(late) >= first + 3


def test_a_request_id_in_use_is_refused(engine: Engine) -> None:
    engine.add_request(PROMPT, greedy(), request_id="x")
    with pytest.raises(RequestError, match="'x' is in use"):
        engine.add_request(PROMPT, greedy(), request_id="x")
    assert set(drain(engine)) == {"x"}
    engine.add_request(PROMPT, greedy(), request_id="x")


def test_a_length_beyond_the_model_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="2048"):
        make_engine(root / "base", max_model_len=4096)


def _empty(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _garbage(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 100)


def _misshapen(folder: Path) -> None:
    change_tensors(folder, lambda found: found.update({k: v[:, :-1] for k, v in found.items()}))


def _nan(folder: Path) -> None:
    change_tensors(folder, lambda found: next(iter(found.values())).fill_(float("nan")))


def _unknown(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "surprise": 1}))


@pytest.mark.parametrize("spoil", [_empty, _garbage, _misshapen, _nan, _unknown])
@pytest.mark.parametrize("name", ["new", "a"])
def test_a_malformed_adapter_leaves_the_running_ones_alone(
    engine: Engine, tmp_path: Path, name: str, spoil: Any
) -> None:
    alone = tokens(engine, "a", max_tokens=6)
    spoil(write_adapter(tmp_path, TINY))
    request = engine.add_request(PROMPT, greedy(6), adapter="a")
    engine.step()
    before = (engine.memory(), engine.adapters)
    with pytest.raises(AdapterInvalid):
        engine.load_adapter(name, tmp_path)
    assert (engine.memory(), engine.adapters) == before
    engine.check_integrity()
    assert drain(engine)[request].outputs[0].token_ids == alone
    assert tokens(engine, "a", max_tokens=6) == alone


def test_an_adapter_too_large_or_badly_named_is_refused(root: Path, tmp_path: Path) -> None:
    engine = make_engine(root / "base", {"a": root / "a"}, max_lora_rank=16)
    before = (engine.memory(), engine.adapters)
    with pytest.raises(AdapterTooLarge):
        engine.load_adapter("c", root / "c")
    with pytest.raises(AdapterError):
        engine.load_adapter("../a", root / "a")
    with pytest.raises(AdapterNotFound):
        engine.unload_adapter("c")
    assert (engine.memory(), engine.adapters) == before


def test_a_replaced_adapter_serves_its_old_requests_to_the_end(engine: Engine, root: Path) -> None:
    old = tokens(engine, "a")
    first = engine.add_request(PROMPT, greedy(), adapter="a")
    engine.step()
    waiting = engine.add_request(PROMPT, greedy(), adapter="a")
    digest = engine.load_adapter("a", root / "c")
    assert engine.adapters["a"].digest == digest
    second = engine.add_request(PROMPT, greedy(), adapter="a")
    done = {i: output.outputs[0].token_ids for i, output in drain(engine).items()}
    assert done[first] == done[waiting] == old
    engine.load_adapter("c", root / "c")
    assert done[second] == tokens(engine, "c") != old


def test_an_unloaded_adapter_serves_its_requests_to_their_end(engine: Engine) -> None:
    alone, plain = tokens(engine, "a"), tokens(engine)
    request = engine.add_request(PROMPT, greedy(), adapter="a")
    engine.step()
    loaded = engine.memory()["adapters"]
    engine.unload_adapter("a")
    with pytest.raises(AdapterNotFound):
        engine.add_request(PROMPT, greedy(), adapter="a")
    assert drain(engine)[request].outputs[0].token_ids == alone
    assert engine.memory()["adapters"] < loaded
    assert set(engine.adapters) == {"b"}
    assert tokens(engine) == plain


def test_the_prefix_cache_is_shared_by_equal_mixes_alone(engine: Engine, root: Path) -> None:
    def cached(adapter: Any) -> int:
        return run(engine, [Job(prompt_of(40), greedy(2), adapter)])[0].num_cached_tokens

    specs = (None, "a", "b", {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.25})
    assert [cached(spec) for spec in specs] == [0] * 5
    assert [cached(spec) for spec in specs] == [32] * 5
    assert cached({"b": 0.5, "a": 0.5}) == 32
    engine.load_adapter("a", root / "c")
    assert cached("a") == 0
    engine.load_adapter("again", root / "b")
    assert cached("again") == 32


def test_a_prefix_of_another_adapter_never_changes_an_answer(engine: Engine, root: Path) -> None:
    jobs = [Job(prompt_of(40), greedy(6, logprobs=2), spec) for spec in (None, "a", "b")]
    warm = [facts(run(engine, [job])[0]) for job in jobs]
    folders = {name: root / name for name in "ab"}
    cold = make_engine(root / "base", folders, enable_prefix_caching=False)
    assert [facts(run(cold, [job])[0]) for job in jobs] == warm


def test_stats_count_what_was_computed(engine: Engine) -> None:
    run(engine, [Job(PROMPT, greedy(4))])
    stats = engine.stats
    assert (stats.steps, stats.generated_tokens, stats.preemptions) == (4, 4, 0)
    assert (stats.running, stats.waiting) == (0, 0)


def test_a_request_that_can_never_fit_leaves_no_hold_on_its_adapter(root: Path) -> None:
    engine = make_engine(root / "base", {"a": root / "a"}, num_kv_blocks=2, block_size=8)
    with pytest.raises(CapacityError):
        engine.add_request(prompt_of(40), greedy(4), adapter="a")
    engine.check_integrity()
    engine.unload_adapter("a")
    assert engine.memory()["adapters"] == 0


def test_a_mapping_of_the_callers_own_is_copied_once(engine: Engine) -> None:
    """It may raise at the second look, or change: nobody else's answer may depend on it."""

    class Fickle(Mapping[str, float]):
        looks = 0

        def __len__(self) -> int:
            return 1

        def __getitem__(self, name: str) -> float:
            return 1.0

        def __iter__(self) -> Iterator[str]:
            self.looks += 1
            if self.looks > 1:
                raise OSError("gone")
            return iter(["a"])

    weights = {"b": 1.0}
    first = engine.add_request(list(PROMPT), greedy(3), adapter=weights)
    second = engine.add_request(list(PROMPT), greedy(3), adapter=Fickle())
    weights["a"] = 5.0
    finished = drain(engine)
    assert finished[first].adapter == {"b": 1.0}
    assert finished[second].adapter == {"a": 1.0}
    fickle = Fickle()
    fickle.looks = 1
    with pytest.raises(RequestError, match="adapter cannot be read"):
        engine.add_request(list(PROMPT), greedy(3), adapter=fickle)


def test_a_callers_id_that_looks_like_ours_is_no_trouble(engine: Engine) -> None:
    number = int(engine.add_request(list(PROMPT), greedy(2)).removeprefix("request-"))
    taken = f"request-{number + 1}"
    engine.add_request(list(PROMPT), greedy(2), request_id=taken)
    ours = engine.add_request(list(PROMPT), greedy(2))
    assert drain(engine).keys() == {f"request-{number}", taken, ours}


def test_arguments_that_are_none(engine: Engine) -> None:
    huge: Any = range(2**62)
    wrong: list[tuple[Any, Any]] = [
        (RequestError, lambda: engine.add_request([5], True)),  # type: ignore[arg-type]
        (RequestError, lambda: engine.add_request([5], request_id=[])),  # type: ignore[arg-type]
        (CapacityError, lambda: engine.add_request(huge)),
        (RequestError, lambda: engine.output(None)),  # type: ignore[arg-type]
        (AdapterNotFound, lambda: engine.unload_adapter(None)),  # type: ignore[arg-type]
        (AdapterInvalid, lambda: engine.load_adapter("z", None)),  # type: ignore[arg-type]
    ]
    for error, call in wrong:
        with pytest.raises(error):
            call()
    assert engine.abort([]) is False  # type: ignore[arg-type]
    assert not engine.has_work


def test_a_prompt_is_scored_once_for_all_its_answers(engine: Engine) -> None:
    prompt, before = prompt_of(60, seed=77), engine.stats.prompt_tokens
    params = SamplingParams(temperature=1, seed=3, max_tokens=2, prompt_logprobs=2, n=4)
    output = run(engine, [Job(prompt, params)])[0]
    assert engine.stats.prompt_tokens - before < 2 * len(prompt)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt)
    alone = run(engine, [Job(prompt, params.clone(n=1))])[0]
    assert output.prompt_logprobs == alone.prompt_logprobs
    assert output.outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize("missing", ["base", "error"])
def test_an_activated_lora_says_where_it_began(missing: str, root: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, TINY, seed=7, alora_invocation_tokens=[7, 9])
    engine = make_engine(root / "base", {"x": folder, "a": root / "a"}, alora_missing=missing)
    prompt = (*PROMPT, 7, 9, 7, 9, 5)
    jobs = [Job(prompt, greedy(), spec) for spec in ("x", "a", None)]
    assert [output.adapter_start for output in run(engine, jobs)] == [len(PROMPT) + 2, 0, None]
    with pytest.raises(RequestError, match="an activated LoRA cannot be in a mix"):
        add(engine, Job(prompt, greedy(), {"x": 1.0, "a": 1.0}))
    without = Job(PROMPT, greedy(), "x")
    if missing == "error":
        with pytest.raises(RequestError, match=r"invocation, the tokens \[7, 9\]; add it"):
            add(engine, without)
    else:
        found, base = run(engine, [without, Job(PROMPT, greedy())])
        assert (found.adapter, found.adapter_start) == ("x", None)
        assert found.outputs[0].token_ids == base.outputs[0].token_ids
    engine.check_integrity()


def test_experts_and_the_base_share_what_precedes_an_invocation(root: Path, tmp_path: Path) -> None:
    """All at once: the text is computed once, and each answers as on an engine of its own."""
    text = prompt_of(96, seed=3)
    folders = {
        f"x{i}": write_adapter(
            tmp_path / str(i), TINY, seed=i, scale=0.3, alora_invocation_tokens=[7, i]
        )
        for i in range(4)
    }
    jobs = [Job((*text, 7, i, 20 + i), greedy(logprobs=3), f"x{i}") for i in range(4)]
    jobs += [Job((*text, 50), greedy(logprobs=3))]
    engine = make_engine(root / "base", folders)
    outputs = run(engine, jobs)
    assert engine.stats.prompt_tokens == 96 + 4 * 3 + 1
    for job, output in zip(jobs, outputs, strict=True):
        alone = make_engine(root / "base", folders, enable_prefix_caching=False)
        assert facts(run(alone, [job])[0]) == facts(output)


def test_an_adapter_in_memory_is_served_like_its_folder(engine: Engine, root: Path) -> None:
    config = json.loads((root / "a" / "adapter_config.json").read_text())
    tensors = load_file(root / "a" / "adapter_model.safetensors")
    digest = engine.load_adapter_from_tensors("x", config, tensors)
    assert digest == engine.adapters["a"].digest
    assert tokens(engine, "x") == tokens(engine, "a")
    before = engine.adapters
    for name, spoilt in (("../x", tensors), ("x", {}), ("x", None), ("x", {"y": 5})):
        with pytest.raises(AdapterError):
            engine.load_adapter_from_tensors(name, config, spoilt)  # type: ignore[arg-type]
    assert engine.adapters == before
