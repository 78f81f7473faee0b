"""A stream holds one output for its reader, who is woken once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from multilora.errors import EngineBusyError, EngineDeadError
from multilora.sampling_params import RequestOutputKind
from multilora.serving.stream import Stream, wake
from tests.multilora.serving.test_deltas import output_of, part

DELTA, CUMULATIVE = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE


def stream_of(kind: RequestOutputKind = DELTA) -> Stream:
    return Stream(lambda _: "r", kind)


def delta(start: int, end: int, *, finished: bool = False) -> Any:
    reason = "stop" if finished else None
    return output_of([part(0, start, end, logprobs=False, reason=reason)], finished=finished)


def test_a_reader_who_is_late_gets_deltas_as_one_and_of_cumulative_outputs_the_last() -> None:
    async def main() -> None:
        deltas, whole = stream_of(), stream_of(CUMULATIVE)
        for i in range(1000):
            assert deltas.put(delta(i, i + 1, finished=i == 999)) is None
            assert whole.put(delta(0, i + 1, finished=i == 999)) is None
        assert await deltas.next() == await whole.next() == delta(0, 1000, finished=True)

    asyncio.run(main())


def test_who_waits_is_woken_once_for_all_outputs_until_he_reads() -> None:
    async def main() -> None:
        stream = stream_of()
        reader = asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        waiter = stream.put(delta(0, 1))
        assert waiter is not None
        assert stream.put(delta(1, 2)) is None
        wake({stream.loop: [waiter]})
        assert await reader == delta(0, 2)

    asyncio.run(main())


def test_an_error_comes_after_what_was_told_and_never_after_the_end() -> None:
    async def main() -> None:
        stream = stream_of()
        stream.put(delta(0, 1))
        stream.end(EngineDeadError("why"))
        stream.end(EngineDeadError("another"))
        assert await stream.next() == delta(0, 1)
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=r"^why$"):
                await stream.next()
        finished = stream_of()
        finished.put(delta(0, 1, finished=True))
        finished.end(EngineDeadError("why"))
        assert (await finished.next()).finished

    asyncio.run(main())


def test_a_reader_that_was_cancelled_and_a_loop_that_was_closed_are_left_alone() -> None:
    async def main() -> tuple[Stream, Any]:
        stream = stream_of()
        reader = asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.sleep(0)
        waiter = stream.put(delta(0, 1))
        wake({stream.loop: [waiter]} if waiter else {})
        await asyncio.sleep(0)
        assert await stream.next() == delta(0, 1)
        return stream, waiter

    stream, waiter = asyncio.run(main())
    wake({stream.loop: [waiter]})


def test_another_loops_reader_is_told_so() -> None:
    async def begin() -> Stream:
        return stream_of()

    stream = asyncio.run(begin())
    with pytest.raises(EngineBusyError, match="read in another event loop"):
        asyncio.run(stream.next())


def test_an_abort_tells_the_rest() -> None:
    async def main() -> None:
        stream = stream_of()
        stream.put(delta(0, 3))
        assert await stream.next() == delta(0, 3)
        stream.abort(delta(0, 5))
        last = await stream.next()
        assert last.finished
        assert (last.outputs[0].token_offset, last.outputs[0].token_ids) == (3, [3, 4])
        assert last.outputs[0].finish_reason == "abort"

    asyncio.run(main())
