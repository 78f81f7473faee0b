"""Answers: cumulative, cut at stop strings, with logprobs if asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from multilora.engine.output_processor import CompletionState
from multilora.outputs import FinishReason
from tests.harness.scheduler_house import House
from tests.harness.tiny_engines import Job, greedy, prompt_of, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multilora.engine.engine import Engine

PROMPT = prompt_of(20)


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


# An answer alone, of a tokenizer whose token i is letter i --------------------------------------


class Letters:
    """Tokens 0.. are the letters from a on."""

    vocab_size, special_ids = 26, frozenset[int]()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def answer_of(text: str, **params: Any) -> CompletionState:
    """An answer to which the letters of a text come one by one, until a stop string ends it."""
    seq = House().seq([25], **params)
    answer = CompletionState(seq, cast("Any", Letters()))
    for letter in text:
        seq.output_ids.append(ord(letter) - ord("a"))
        answer.advance()
        if answer.stop is not None:
            break
    return answer


def test_the_stop_string_that_begins_first_cuts_the_text() -> None:
    answer = answer_of("xabcd", stop=["bcd", "abcd", "zz"])
    assert (answer.text, answer.stop) == ("x", "abcd")


def test_a_stop_string_before_min_tokens_is_text() -> None:
    answer = answer_of("abcabd", stop=["ab"], min_tokens=4)
    assert (answer.text, answer.stop) == ("abc", "ab")
    assert answer_of("abc", stop=["ab"], min_tokens=4).stop is None


def test_what_may_become_a_stop_string_is_held_back_until_the_end() -> None:
    answer = answer_of("abcd", stop=["xyz"])
    assert answer.output().text == "ab"
    answer.seq.finish_reason = FinishReason.LENGTH
    answer.advance()
    assert answer.output().text == "abcd"


def test_the_token_that_stopped_an_answer_is_not_part_of_its_text() -> None:
    seq = House().seq([25], stop_token_ids=[3])
    answer = CompletionState(seq, cast("Any", Letters()))
    seq.output_ids += [0, 1, 3]
    seq.finish_reason = FinishReason.STOP
    answer.advance()
    assert answer.output().text == "ab"
    assert answer.output().token_ids == [0, 1, 3]


def test_an_answer_without_text_has_its_tokens() -> None:
    answer = answer_of("ab")
    answer.give_up()
    answer.advance()
    assert (answer.output().text, answer.output().token_ids) == ("", [0, 1])
