"""The engine from outside: requests in, outputs back, nothing left behind by what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

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
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.adapter_folders import change_tensors, write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.paths import UMA
from tests.harness.tiny_engines import Job, add, drain, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from multilora.engine.engine import Engine

TOKENIZER = UMA / "base"
PROMPT = prompt_of(20)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    write_checkpoint(root / "base")
    for seed, name in enumerate(("a", "b", "c")):
        write_adapter(root / name, TINY, rank=8 * (seed + 1), seed=seed, scale=0.3)
    return root


@pytest.fixture
def engine(root: Path) -> Engine:
    return make_engine(root / "base", {name: root / name for name in "ab"})


@pytest.fixture(scope="module")
def writer(root: Path) -> Engine:
    """An engine that reads and writes text."""
    vocab = load_tokenizer(TOKENIZER).vocab_size
    write_checkpoint(root / "text", vocab_size=vocab, eos_token_ids=())
    return make_engine(root / "text", skip_tokenizer_init=False, tokenizer=str(TOKENIZER))


def tokens(engine: Engine, adapter: Any = None, **fields: Any) -> list[int]:
    return run(engine, [Job(PROMPT, greedy(**fields), adapter)])[0].outputs[0].token_ids


# Steps and outputs


def test_outputs_are_cumulative_and_the_last_one_is_finished(engine: Engine) -> None:
    request = engine.add_request(list(PROMPT), greedy(4), adapter="a", request_id="mine")
    assert request == "mine"
    seen = []
    while engine.has_work:
        (output,) = engine.step()
        answer = output.outputs[0]
        assert output.finished == (answer.finish_reason is not None)
        seen.append(answer.token_ids)
    assert [len(ids) for ids in seen] == [1, 2, 3, 4]
    assert all(seen[-1][: len(ids)] == ids for ids in seen)
    assert (output.request_id, output.adapter, output.prompt) == ("mine", "a", None)
    assert (output.prompt_token_ids, answer.finish_reason) == (list(PROMPT), "length")


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


def test_no_max_tokens_means_up_to_the_length_of_the_model(root: Path) -> None:
    engine = make_engine(root / "base", max_model_len=40)
    output = run(engine, [Job(PROMPT, greedy(None))])[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (20, "length")


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


def test_the_end_of_sequence_ends_an_answer_unless_ignored(engine: Engine) -> None:
    job = {"logit_bias": {2: 100.0}, "max_tokens": 5}
    ended = run(engine, [Job(PROMPT, greedy(ignore_eos=False, **job))])[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([2], "stop", None)
    assert tokens(engine, **job) == [2] * 5
    assert len(tokens(engine, ignore_eos=False, min_tokens=3, **job)) == 4


def test_a_stop_string_cuts_the_text_and_is_never_streamed(writer: Engine) -> None:
    job = Job(tuple(range(40, 60)), greedy(16))
    free = run(writer, [job])[0].outputs[0].text
    assert len(free) > 6
    stop = free[3:6]
    writer.add_request(job.prompt, greedy(16, stop=stop))
    texts = []
    while writer.has_work:
        texts += [output.outputs[0] for output in writer.step()]
    last = texts[-1]
    assert last.text == free[: free.index(stop)]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert all(last.text.startswith(output.text) for output in texts)
    kept = Job(job.prompt, greedy(16, stop=stop, include_stop_str_in_output=True))
    assert run(writer, [kept])[0].outputs[0].text == free[: free.index(stop) + 3]
    writer.check_integrity()


def test_a_text_prompt_is_encoded(writer: Engine) -> None:
    request = writer.add_request("Hello", greedy(2))
    output = drain(writer)[request]
    assert writer.tokenizer is not None
    assert output.prompt == "Hello"
    assert output.prompt_token_ids == writer.tokenizer.encode("Hello")


# Sampling


def test_n_answers_are_those_of_consecutive_seeds(engine: Engine) -> None:
    params = SamplingParams(temperature=1.5, seed=7, n=3, max_tokens=8, ignore_eos=True)
    answers = run(engine, [Job(PROMPT, params, "a")])[0].outputs
    assert [a.index for a in answers] == [0, 1, 2]
    assert len({tuple(a.token_ids) for a in answers}) == 3
    for i, answer in enumerate(answers):
        one = SamplingParams(temperature=1.5, seed=7 + i, max_tokens=8, ignore_eos=True)
        assert run(engine, [Job(PROMPT, one, "a")])[0].outputs[0].token_ids == answer.token_ids


def test_requests_without_a_seed_differ_and_repeat_with_the_engine(root: Path) -> None:
    jobs = [Job(PROMPT, SamplingParams(max_tokens=10, ignore_eos=True))] * 3

    def drawn(seed: int) -> list[list[int]]:
        engine = make_engine(root / "base", seed=seed)
        return [output.outputs[0].token_ids for output in run(engine, jobs)]

    first = drawn(1)
    assert len({tuple(ids) for ids in first}) == 3
    assert drawn(1) == first
    assert drawn(2) != first


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_have_one_entry_for_each_token(engine: Engine, top: int) -> None:
    job = Job(PROMPT, greedy(6, logprobs=top, prompt_logprobs=top), "a")
    output = run(engine, [job])[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    rows = [*output.prompt_logprobs[1:], *answer.logprobs]
    chosen = [*PROMPT[1:], *answer.token_ids]
    assert len(rows) == len(chosen)
    for row, token in zip(rows, chosen, strict=True):
        assert row is not None
        assert token in row
        assert max(top, 1) <= len(row) <= top + 1
        assert set(range(1, top + 1)) <= {entry.rank for entry in row.values()}
    total = sum(row[t].logprob for row, t in zip(answer.logprobs, answer.token_ids, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)


def test_logprobs_are_absent_unless_asked_for(engine: Engine) -> None:
    output = run(engine, [Job(PROMPT, greedy(2))])[0]
    answer = output.outputs[0]
    assert (output.prompt_logprobs, answer.logprobs, answer.cumulative_logprob) == (None,) * 3


# What is refused


@pytest.mark.parametrize(
    ("prompt", "fields", "adapter", "error"),
    [
        (PROMPT, {}, "nobody", AdapterNotFound),
        (PROMPT, {}, {"a": 1.0, "nobody": 1.0}, AdapterNotFound),
        (PROMPT, {}, {"a": float("nan")}, RequestError),
        ((), {}, None, RequestError),
        ("text", {}, None, RequestError),
        ((5, 128), {}, None, RequestError),
        ((-1,), {}, None, RequestError),
        ((True,), {}, None, RequestError),
        (PROMPT, {"stop_token_ids": (128,)}, None, RequestError),
        (PROMPT, {"allowed_token_ids": (128,)}, None, RequestError),
        (PROMPT, {"logit_bias": {128: 1.0}}, None, RequestError),
        (PROMPT, {"stop": "x"}, None, RequestError),
        ((5,) * 256, {}, None, CapacityError),
    ],
)
def test_a_refused_request_costs_nothing(
    engine: Engine, prompt: Any, fields: Any, adapter: Any, error: type[Exception]
) -> None:
    alone = tokens(engine, "b", max_tokens=6)
    request = engine.add_request(PROMPT, greedy(6), adapter="b")
    engine.step()
    before = (engine.memory(), engine.stats, engine.adapters)
    with pytest.raises(error):
        engine.add_request(prompt, greedy(**fields), adapter=adapter)
    assert (engine.memory(), engine.stats, engine.adapters) == before
    engine.check_integrity()
    assert drain(engine)[request].outputs[0].token_ids == alone


def test_a_request_id_in_use_is_refused(engine: Engine) -> None:
    engine.add_request(PROMPT, greedy(), request_id="x")
    with pytest.raises(RequestError, match="'x' is in use"):
        engine.add_request(PROMPT, greedy(), request_id="x")
    assert set(drain(engine)) == {"x"}
    engine.add_request(PROMPT, greedy(), request_id="x")


def test_a_prompt_larger_than_the_pool_is_refused(root: Path) -> None:
    engine = make_engine(root / "base", num_kv_blocks=2)
    with pytest.raises(CapacityError, match="num_kv_blocks"):
        engine.add_request(prompt_of(32), greedy(n=3))
    engine.check_integrity()
    assert not engine.has_work


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


# Adapters that come and go


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
