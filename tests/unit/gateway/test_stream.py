"""Merging of choices, and the buffer between a turn and its reader."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import ChoiceFinished, Event, Failed, Finished, Started, TextDelta, Timings, Usage
from keepwarm.gateway.stream import Choices, EventStream

pytestmark = pytest.mark.anyio


def run_of(choice: int, n_deltas: int) -> list[Event]:
    return [
        Started(10, cache_read=choice),
        *(TextDelta(f"{choice}.{i}") for i in range(n_deltas)),
        ChoiceFinished("stop", n_deltas),
        Finished(Usage(10 - choice, choice, 0, n_deltas), Timings(decode_ms=float(choice))),
    ]


@given(data=st.data(), lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_any_interleaving_merges_into_one_well_formed_stream(data: st.DataObject, lengths: list[int]) -> None:
    runs = [run_of(choice, n) for choice, n in enumerate(lengths)]
    choices, merged = Choices(len(runs)), []
    while any(runs):
        choice = data.draw(st.sampled_from([i for i, run in enumerate(runs) if run]))
        merged += choices.feed(choice, runs[choice].pop(0))
    assert merged[0] == Started(10, cache_read=0)  # choice 0's, whoever began first
    assert sum(isinstance(event, Started) for event in merged) == 1
    for choice, n_deltas in enumerate(lengths):
        own = [event for event in merged[1:] if getattr(event, "choice", None) == choice]
        assert own == [
            *(TextDelta(f"{choice}.{i}", choice) for i in range(n_deltas)),
            ChoiceFinished("stop", n_deltas, choice),
        ]
    finished = choices.finished()
    assert finished.usage == Usage(10, 0, 0, sum(lengths))  # the prompt once
    assert finished.timings == Timings()


async def test_the_reader_gets_everything_that_is_there_at_once() -> None:
    stream = EventStream(10)
    stream.emit(Started(1, 0))
    stream.emit(TextDelta("a"))
    await stream.begin()
    assert await stream.batch(None) == [Started(1, 0), TextDelta("a")]
    assert not stream.is_read
    stream.emit(Finished(Usage(1, 0, 0, 1)))
    assert await stream.batch(None) == [Finished(Usage(1, 0, 0, 1))]
    assert stream.is_read


async def test_silence_is_an_empty_batch() -> None:
    stream = EventStream(10)
    assert await stream.batch(0.001) == []
    stream.emit(TextDelta("a"))
    assert await stream.batch(0.001) == [TextDelta("a")]


async def test_a_failure_before_the_start_is_raised_with_its_path() -> None:
    stream = EventStream(10)
    stream.fail(ApiError(ErrorKind.INVALID_REQUEST, "no", param="messages[0]"))
    with pytest.raises(ApiError) as raised:
        await stream.begin()
    assert raised.value.param == "messages[0]"


async def test_a_failure_after_the_start_is_the_terminal_event() -> None:
    stream = EventStream(10)
    stream.emit(Started(1, 0))
    stream.fail(ApiError(ErrorKind.ENGINE_DOWN, "gone", retry_after_s=3), Usage(1, 0, 0, 0))
    await stream.begin()
    assert (await stream.batch(None))[-1] == Failed(ErrorKind.ENGINE_DOWN, "gone", Usage(1, 0, 0, 0), 3)


async def test_only_the_first_end_counts() -> None:
    stream = EventStream(10)
    stream.emit(Finished(Usage(1, 0, 0, 0)))
    stream.fail(ApiError(ErrorKind.CLIENT_CLOSED, "gone"))
    assert isinstance(stream.terminal, Finished)
    assert stream.error is None
    with pytest.raises(AssertionError):
        stream.emit(TextDelta("late"))


async def test_a_reader_too_far_behind_ends_the_turn_and_can_still_be_told() -> None:
    stream = EventStream(2)
    stream.emit(Started(1, 0))
    stream.emit(TextDelta("a"))
    with pytest.raises(ApiError, match="2 events of the answer are waiting to be read, limit 2") as raised:
        stream.emit(TextDelta("b"))
    stream.fail(raised.value)
    assert len(await stream.batch(None)) == 3
    assert stream.is_read


async def test_a_waiting_reader_is_woken() -> None:
    stream = EventStream(2)
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(stream.batch(None))
        await asyncio.sleep(0)
        stream.emit(TextDelta("a"))
    assert reading.result() == [TextDelta("a")]
