"""Answers: cumulative, cut at stop strings, with logprobs if asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.tiny_engines import Job, greedy, prompt_of, run

if TYPE_CHECKING:
    from multilora.engine.engine import Engine

PROMPT = prompt_of(20)


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
