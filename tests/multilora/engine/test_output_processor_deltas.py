"""What an answer tells while it runs: deltas, intervals, texts of tokens, times."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from multilora.errors import RequestError
from multilora.sampling_params import RequestOutputKind
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.failpoints import raised_at_call
from tests.harness.model_folders import write_checkpoint
from tests.harness.paths import UMA
from tests.harness.tiny_engines import Job, drain, facts, greedy, make_engine, run

if TYPE_CHECKING:
    from multilora.engine.engine import Engine
    from multilora.outputs import CompletionOutput, RequestOutput

TOKENIZER = UMA / "base"
PROMPT = tuple(range(40, 60))
DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def teller(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """It reads and writes text."""
    root = tmp_path_factory.mktemp("writer")
    write_checkpoint(root, vocab_size=load_tokenizer(TOKENIZER).vocab_size, eos_token_ids=())
    settings: dict[str, Any] = {"skip_tokenizer_init": False, "tokenizer": str(TOKENIZER)}
    return make_engine(root, async_scheduling=request.param, max_logprobs=-1, **settings)


def start(engine: Engine, **fields: Any) -> str:
    return engine.add_request(PROMPT, greedy(**{"max_tokens": 20, **fields}))


def outputs(teller: Engine) -> list[RequestOutput]:
    found = []
    while teller.has_work:
        found += teller.step()
        teller.check_integrity()
    return found


def joined(deltas: list[RequestOutput]) -> list[CompletionOutput]:
    """The answers that the deltas add up to; none may overlap or leave anything out."""
    answers: dict[int, CompletionOutput] = {}
    for output in deltas:
        for new in output.outputs:
            old = answers.get(new.index)
            assert new.token_offset == (0 if old is None else len(old.token_ids))
            if old is None:
                answers[new.index] = new
                continue
            assert old.finish_reason is None
            answers[new.index] = replace(
                new,
                text=old.text + new.text,
                token_ids=old.token_ids + new.token_ids,
                logprobs=None if new.logprobs is None else (old.logprobs or []) + new.logprobs,
                token_offset=0,
            )
    return [answers[i] for i in sorted(answers)]


FREE: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 5, "logprobs": 2}


@pytest.fixture(scope="module")
def stop(teller: Engine) -> str:
    """A text in the middle of the second answer that spans tokens."""
    text = run(teller, [Job(PROMPT, greedy(20, **FREE))])[0].outputs[1].text
    return text[8:12]


@pytest.mark.parametrize("interval", [None, 3])
@pytest.mark.parametrize("cut", [False, True], ids=["free", "stopped"])
def test_deltas_add_up_to_the_answer(
    teller: Engine, stop: str, *, cut: bool, interval: int | None
) -> None:
    fields = {**FREE, "stop": [stop] if cut else None}
    whole = run(teller, [Job(PROMPT, greedy(20, **fields))])[0]
    assert whole.outputs[1].text
    assert not cut or whole.outputs[1].finish_reason == "stop"
    start(teller, output_kind=DELTA, stream_interval=interval, **fields)
    deltas = outputs(teller)
    assert joined(deltas) == whole.outputs
    sizes = [len(a.token_ids) for o in deltas for a in o.outputs if a.index == 0]
    assert max(sizes) == (interval or 1)
    assert sizes[0] == 1
    assert [o.finished for o in deltas] == [False] * (len(deltas) - 1) + [True]


def test_cumulative_outputs_come_at_the_interval(teller: Engine) -> None:
    start(teller, stream_interval=4)
    assert [len(o.outputs[0].token_ids) for o in outputs(teller)] == [1, 5, 9, 13, 17, 20]


def test_final_only_is_one_output_with_everything(teller: Engine) -> None:
    whole = run(teller, [Job(PROMPT, greedy(20, **FREE))])[0]
    start(teller, output_kind=FINAL, **FREE)
    (only,) = outputs(teller)
    assert facts(only) == facts(whole)


def test_what_is_known_can_be_asked_for_between_deltas(teller: Engine) -> None:
    request = start(teller, output_kind=DELTA)
    deltas = []
    while teller.has_work:
        deltas += teller.step()
        known = teller.output(request).outputs[0]
        assert (known.token_ids, known.text) == (
            joined(deltas)[0].token_ids if deltas else [],
            joined(deltas)[0].text if deltas else "",
        )


def test_an_interrupt_at_any_call_loses_and_repeats_nothing(teller: Engine) -> None:
    whole = run(teller, [Job(PROMPT, greedy(6, **FREE))])[0]
    for number in range(3, 900, 41):
        request = teller.add_request(PROMPT, greedy(6, output_kind=DELTA, **FREE))
        deltas: list[RequestOutput] = []
        interrupted = 0
        while teller.has_work:
            came: list[RequestOutput] = []
            at = number if len(deltas) == 2 and not interrupted else 10**9
            raised = raised_at_call(
                at, KeyboardInterrupt(), lambda came=came: came.extend(teller.step())
            )
            interrupted += bool(raised)
            deltas += came
        assert joined(deltas) == whole.outputs, number
        assert request not in teller.request_ids


def test_the_token_that_stopped_it_is_text_when_asked_for(teller: Engine) -> None:
    free = run(teller, [Job(PROMPT, greedy(8))])[0].outputs[0]
    last = free.token_ids[4]
    first = free.token_ids.index(last)
    without, included = (
        run(teller, [Job(PROMPT, greedy(8, stop_token_ids=[last], **more))])[0].outputs[0]
        for more in ({}, {"include_stop_str_in_output": True})
    )
    assert without.token_ids == included.token_ids == free.token_ids[: first + 1]
    assert len(without.text) < len(included.text)
    assert free.text.startswith(included.text)


def test_log_probabilities_have_their_tokens_texts(teller: Engine) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    fields = {"logprobs": 2, "prompt_logprobs": 1}
    output = run(teller, [Job(PROMPT, greedy(4, **fields))])[0]
    assert output.prompt_logprobs is not None
    for place in (*(output.outputs[0].logprobs or ()), *output.prompt_logprobs[1:]):
        assert place
        for token, found in place.items():
            assert found.decoded_token == tokenizer.decode([token], skip_special_tokens=False)
    bare = run(teller, [Job(PROMPT, greedy(4, detokenize=False, **fields))])[0]
    assert {found.decoded_token for place in bare.outputs[0].logprobs or () for found in
            place.values()} == {None}  # fmt: skip


def test_all_log_probabilities_when_the_engine_allows_them(teller: Engine) -> None:
    vocab = load_tokenizer(TOKENIZER).vocab_size
    output = run(teller, [Job(PROMPT, greedy(2, logprobs=-1, prompt_logprobs=-1))])[0]
    places = [*(output.outputs[0].logprobs or ()), *(output.prompt_logprobs or ())[1:]]
    assert [len(place or ()) for place in places] == [vocab] * (2 + len(PROMPT) - 1)
    limited = make_engine(teller.config.model, max_logprobs=3)  # type: ignore[arg-type]
    for wrong in ({"logprobs": 4}, {"prompt_logprobs": -1}):
        with pytest.raises(RequestError, match="max_logprobs=3"):
            limited.add_request(PROMPT, greedy(2, **wrong))


def test_times_are_the_clocks(teller: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on by one second whenever it is asked."""
    seconds = itertools.count(100)
    for owner in (teller, teller._core):
        monkeypatch.setattr(owner, "_clock", lambda: float(next(seconds)))
    request = start(teller, max_tokens=3)
    before = teller.output(request).metrics
    assert before is not None
    assert (before.scheduled_ts, before.first_token_ts, before.first_token_latency) == (0, 0, 0)
    (output,) = drain(teller).values()
    found = output.metrics
    assert found is not None
    assert (found.queued_ts, found.scheduled_ts, found.first_token_ts) == (100, 101, 102)
    assert found.last_token_ts == 104
    assert found.num_generation_tokens == 3
    assert found.first_token_latency == found.first_token_ts - found.queued_ts
    assert output.outputs[0].finished()


def test_a_delta_has_what_the_prompt_scored_once(teller: Engine) -> None:
    request = start(teller, output_kind=DELTA, prompt_logprobs=1, n=2)
    first, *others = outputs(teller)
    assert others
    whole = run(teller, [Job(PROMPT, greedy(20, prompt_logprobs=1, n=2))])[0]
    assert first.request_id == request
    assert first.prompt_logprobs == whole.prompt_logprobs
    assert all(output.prompt_logprobs == [] for output in others)
