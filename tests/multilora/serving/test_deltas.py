"""Deltas that are told late lose nothing and repeat nothing."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from multilora.outputs import CompletionOutput, Logprob, RequestOutput
from multilora.serving.deltas import NOTHING, MergedDeltas, Told, aborted
from tests.harness.streams import joined


def output_of(answers: list[CompletionOutput], **fields: Any) -> RequestOutput:
    given: dict[str, Any] = {"prompt_logprobs": None, "finished": False, "error": None, **fields}
    return RequestOutput(
        request_id="r",
        prompt="p",
        prompt_token_ids=[1],
        outputs=answers,
        num_cached_tokens=0,
        adapter=None,
        **given,
    )


def part(index: int, start: int, end: int, *, logprobs: bool, reason: str | None = None) -> Any:
    """Tokens `start` to `end` of an answer whose i-th token is i, as "i,"."""
    ids = list(range(start, end))
    return CompletionOutput(
        index=index,
        text="".join(f"{i}," for i in ids),
        token_ids=ids,
        cumulative_logprob=-float(end) if logprobs else None,
        logprobs=[{i: Logprob(-1.0, 1)} for i in ids] if logprobs else None,
        finish_reason=reason,
        stop_reason=None,
        token_offset=start,
    )


STEPS = st.lists(  # of each, how many tokens come of which answers
    st.dictionaries(st.integers(0, 2), st.integers(0, 4), min_size=1), min_size=1, max_size=12
)


@st.composite
def deltas(draw: st.DrawFn) -> list[RequestOutput]:
    """All that a request of up to three answers tells, as steps with and without news of each."""
    steps, logprobs = draw(STEPS), draw(st.booleans())
    last = {index: number for number, step in enumerate(steps) for index in step}
    reasons = {index: draw(st.sampled_from(("stop", "error"))) for index in last}
    ends, found = dict.fromkeys(last, 0), []
    for number, step in enumerate(steps):
        answers = []
        for index in sorted(step):
            start, end = ends[index], ends[index] + step[index]
            reason = reasons[index] if number == last[index] else None
            answers.append(part(index, start, end, logprobs=logprobs, reason=reason))
            ends[index] = end
        failed = any(reasons[index] == "error" and number >= last[index] for index in last)
        found.append(
            output_of(
                answers,
                prompt_logprobs=[] if found else [None],
                finished=number == len(steps) - 1,
                error="why" if failed else None,
            )
        )
    return found


@given(told=deltas(), data=st.data())
def test_merged_in_any_way_they_tell_the_same(
    told: list[RequestOutput], data: st.DataObject
) -> None:
    merged, waiting = [], None
    for delta in told:
        if waiting is None:
            waiting = MergedDeltas(delta)
        else:
            waiting.add(delta)
        if data.draw(st.booleans()):
            merged.append(waiting.output())
            waiting = None
    if waiting is not None:
        merged.append(waiting.output())
    assert joined(merged) == joined(told)


@given(told=deltas(), data=st.data())
def test_an_abort_tells_what_deltas_have_not(
    told: list[RequestOutput], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(told)))
    known, everything = told[:count], joined(told)
    so_far: dict[int, Told] = {}
    for delta in known:
        for answer in delta.outputs:
            tokens, chars = so_far.get(answer.index, NOTHING)
            so_far[answer.index] = Told(tokens + len(answer.token_ids), chars + len(answer.text))
    running = output_of(
        [
            part(a.index, 0, len(a.token_ids), logprobs=a.logprobs is not None)
            for a in everything.outputs
        ],
        prompt_logprobs=[None],
    )
    whole = joined([*known, aborted(running, so_far)])
    cumulative = aborted(running, None)
    for output in (whole, cumulative):
        assert output.finished
        assert output.prompt_logprobs == [None]
        assert [a.token_ids for a in output.outputs] == [a.token_ids for a in everything.outputs]
        assert [a.text for a in output.outputs] == [a.text for a in everything.outputs]
        assert {a.finish_reason for a in output.outputs} == {"abort"}


def test_a_gap_between_deltas_is_a_bug() -> None:
    merged = MergedDeltas(output_of([part(0, 0, 2, logprobs=False)]))
    with pytest.raises(AssertionError, match="not the next"):
        merged.add(output_of([part(0, 3, 4, logprobs=False)]))
