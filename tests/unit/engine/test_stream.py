"""Token streams: in order, complete, and coalesced as asked, each choice for itself."""

import asyncio
import random
from collections.abc import Callable

import pytest
import uvloop

from engine.client.stream import Coalescing, Crowd, Slice, TokenStream
from engine.types import Finished, FinishReason, TokenEvent


def finished(reason: FinishReason = FinishReason.LENGTH, choice: int = 0) -> Finished:
    return Finished(
        id="a",
        reason=reason,
        choice=choice,
        scheduled_at=None,
        first_token_at=None,
        finished_at=1.0,
    )


def put(stream: TokenStream, tokens: range | list[int], choice: int = 0) -> None:
    for token in tokens:
        stream.put_token(TokenEvent(id="a", token=token, choice=choice))


def ids(piece: Slice) -> list[int]:
    return [event.token for event in piece.tokens]


async def read(stream: TokenStream, coalescing: Coalescing) -> list[Slice]:
    """Slices until every choice has ended."""
    slices: list[Slice] = []
    async with asyncio.timeout(5):
        while sum(one.finished is not None for one in slices) < stream.choices:
            slices.append(await stream.next(coalescing))
    return slices


async def soon(stream: TokenStream, coalescing: Coalescing) -> Slice:
    """The next slice, which must be there before ``coalescing`` stops waiting for more."""
    async with asyncio.timeout(5):
        return await stream.next(coalescing)


async def test_what_waits_comes_at_once_and_in_order() -> None:
    stream = TokenStream()
    put(stream, range(5))
    piece = await stream.next(Coalescing())
    assert (ids(piece), piece.finished, piece.choice) == ([0, 1, 2, 3, 4], None, 0)


async def test_events_come_whole() -> None:
    stream = TokenStream()
    event = TokenEvent(id="a", token=1, cached=16)
    stream.put_token(event)
    assert (await stream.next(Coalescing())).tokens == [event]


async def test_no_slice_exceeds_max_tokens_and_the_end_comes_with_the_last() -> None:
    stream = TokenStream()
    put(stream, range(10))
    stream.put_finished(finished())
    slices = await read(stream, Coalescing(max_tokens=4))
    assert [ids(one) for one in slices] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [one.finished is None for one in slices] == [True, True, False]


async def test_an_end_without_tokens_comes_alone() -> None:
    stream = TokenStream()
    stream.put_finished(finished())
    assert (await stream.next(Coalescing())).tokens == []


async def test_the_first_end_counts() -> None:
    stream = TokenStream()
    stream.put_finished(finished(FinishReason.EOS))
    stream.put_finished(finished(FinishReason.ERROR))
    (last,) = await read(stream, Coalescing())
    assert last.finished is not None
    assert last.finished.reason is FinishReason.EOS


async def test_it_waits_where_there_is_nothing() -> None:
    stream = TokenStream()
    put(stream, [1])
    await stream.next(Coalescing())
    waiting = asyncio.ensure_future(stream.next(Coalescing()))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    put(stream, [2])
    assert ids(await waiting) == [2]


async def test_the_first_token_never_waits_for_others() -> None:
    stream, slow = TokenStream(), Coalescing(max_tokens=8, max_delay=60.0)
    put(stream, [1])
    assert ids(await soon(stream, slow)) == [1]


async def test_later_tokens_gather_until_there_are_enough() -> None:
    stream, slow = TokenStream(), Coalescing(max_tokens=3, max_delay=60.0)
    put(stream, [0])
    await stream.next(slow)
    waiting = asyncio.ensure_future(stream.next(slow))
    for token in (1, 2):
        put(stream, [token])
        await asyncio.sleep(0.005)
        assert not waiting.done()
    put(stream, [3])
    async with asyncio.timeout(5):
        assert ids(await waiting) == [1, 2, 3]


async def test_later_tokens_gather_until_the_delay_is_over() -> None:
    stream, coalescing = TokenStream(), Coalescing(max_tokens=99, max_delay=0.02)
    put(stream, [0])
    await stream.next(coalescing)
    put(stream, [1])
    assert ids(await soon(stream, coalescing)) == [1]
    put(stream, [2])
    stream.put_finished(finished())
    assert ids(await soon(stream, coalescing)) == [2]


async def test_tokens_that_trickle_do_not_prolong_the_delay() -> None:
    """It counts from the first of them."""
    stream, coalescing = TokenStream(), Coalescing(max_tokens=10_000, max_delay=0.05)
    put(stream, [0])
    await stream.next(coalescing)
    waiting = asyncio.ensure_future(stream.next(coalescing))
    async with asyncio.timeout(5):
        while not waiting.done():
            put(stream, [1])
            await asyncio.sleep(0.002)
    assert ids(await waiting)


async def test_the_end_does_not_wait_for_the_delay() -> None:
    stream, slow = TokenStream(), Coalescing(max_tokens=99, max_delay=60.0)
    put(stream, [0])
    await stream.next(slow)
    waiting = asyncio.ensure_future(stream.next(slow))
    put(stream, [1])
    await asyncio.sleep(0)
    stream.put_finished(finished())
    async with asyncio.timeout(5):
        last = await waiting
    assert (ids(last), last.finished) == ([1], finished())


async def test_a_reader_that_gave_up_finds_its_tokens_later() -> None:
    stream, slow = TokenStream(), Coalescing(max_tokens=99, max_delay=60.0)
    put(stream, [0])
    await stream.next(slow)
    put(stream, [1])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.next(slow), 0.01)
    assert ids(await soon(stream, Coalescing())) == [1]


async def test_choices_keep_their_tokens_apart() -> None:
    stream = TokenStream(3)
    for token in range(6):
        put(stream, [token], choice=token % 3)
    for choice in range(3):
        stream.put_finished(finished(choice=choice))
    slices = await read(stream, Coalescing())
    found = {one.choice: (ids(one), one.finished) for one in slices}
    assert len(slices) == 3
    assert found == {n: ([n, n + 3], finished(choice=n)) for n in range(3)}


async def test_it_has_ended_when_each_choice_has() -> None:
    stream = TokenStream(2)
    stream.put_finished(finished(choice=1))
    stream.put_finished(finished(choice=1))
    assert not stream.ended
    stream.put_finished(finished(choice=0))
    assert stream.ended


async def test_a_first_token_does_not_wait_for_another_choice_that_gathers() -> None:
    stream, slow = TokenStream(2), Coalescing(max_tokens=8, max_delay=60.0)
    put(stream, [0])
    await stream.next(slow)
    put(stream, [1, 2])
    waiting = asyncio.ensure_future(stream.next(slow))
    await asyncio.sleep(0.005)
    assert not waiting.done()
    put(stream, [9], choice=1)
    async with asyncio.timeout(5):
        piece = await waiting
    assert (piece.choice, ids(piece)) == (1, [9])


async def test_a_first_token_comes_before_others_that_may_wait() -> None:
    stream, slow = TokenStream(2), Coalescing(max_tokens=8, max_delay=60.0)
    put(stream, [0])
    await stream.next(slow)
    put(stream, [1, 2, 3])
    put(stream, [9], choice=1)
    piece = await soon(stream, slow)
    assert (piece.choice, ids(piece)) == (1, [9])


async def test_an_end_does_not_wait_for_another_choice_that_gathers() -> None:
    stream, slow = TokenStream(2), Coalescing(max_tokens=8, max_delay=60.0)
    for choice in range(2):
        put(stream, [0], choice)
        await stream.next(slow)
    put(stream, [1, 2])
    waiting = asyncio.ensure_future(stream.next(slow))
    await asyncio.sleep(0.005)
    stream.put_finished(finished(choice=1))
    async with asyncio.timeout(5):
        piece = await waiting
    assert (piece.choice, ids(piece), piece.finished) == (1, [], finished(choice=1))


async def test_choices_gather_at_the_same_time() -> None:
    """The delay of one is not added to that of the next: it counts from arrival."""
    stream, coalescing = TokenStream(4), Coalescing(max_tokens=8, max_delay=0.02)
    for choice in range(4):
        put(stream, [0], choice)
        await stream.next(coalescing)
    for choice in range(4):
        put(stream, [1], choice)
    await asyncio.sleep(0.03)
    found = []
    for _ in range(4):
        reading = asyncio.ensure_future(stream.next(coalescing))
        await asyncio.sleep(0)
        assert reading.done()
        found.append(reading.result().choice)
    assert found == [0, 1, 2, 3]


async def test_the_one_with_most_comes_first() -> None:
    stream = TokenStream(2)
    put(stream, [1], choice=0)
    put(stream, [2, 3], choice=1)
    found = [(await stream.next(Coalescing())).choice for _ in range(2)]
    assert found == [1, 0]


@pytest.mark.parametrize("delay", [0.0, 0.001])
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_the_interleaving_each_choice_is_complete(seed: int, delay: float) -> None:
    draw = random.Random(seed)
    choices = draw.randint(1, 5)
    stream = TokenStream(choices)
    coalescing = Coalescing(max_tokens=draw.randint(1, 6), max_delay=delay)
    reading = asyncio.ensure_future(read(stream, coalescing))
    left = {choice: draw.randint(0, 20) for choice in range(choices)}
    wanted = {choice: list(range(count)) for choice, count in left.items()}
    while left:
        choice = draw.choice(list(left))
        if left[choice]:
            put(stream, [len(wanted[choice]) - left[choice]], choice)
            left[choice] -= 1
        else:
            stream.put_finished(finished(choice=choice))
            del left[choice]
        if draw.random() < 0.3:
            await asyncio.sleep(0)
    slices = await reading
    for choice in range(choices):
        own = [one for one in slices if one.choice == choice]
        assert [token for one in own for token in ids(one)] == wanted[choice]
        assert [one.finished is not None for one in own] == [False] * (len(own) - 1) + [True]
        assert all(len(one.tokens) <= coalescing.max_tokens for one in own)


@pytest.mark.parametrize("values", [{"max_tokens": 0}, {"max_tokens": -1}])
def test_a_slice_without_tokens_cannot_be_asked_for(values: dict[str, int]) -> None:
    """It would never come to an end, and hold the event loop for ever."""
    with pytest.raises(ValueError, match="max_tokens"):
        Coalescing(**values)  # type: ignore[arg-type]


def test_the_larger_the_crowd_the_longer_a_token_may_wait_up_to_a_bound() -> None:
    delays = [Coalescing().delay(size) for size in range(200)]
    assert delays[0] == delays[1] == 0.0
    assert delays == sorted(delays)
    assert delays[2] > 0
    assert delays[-1] == 0.04
    assert Coalescing(max_delay=0.0).delay(200) == 0.0


async def test_streams_are_a_crowd_from_their_first_token_to_their_end() -> None:
    crowd = Crowd()
    streams = [TokenStream(1 + number % 2, crowd) for number in range(3)]
    assert crowd.size == 0
    for stream in streams:
        put(stream, [1, 2])
    assert crowd.size == 3
    streams[0].put_finished(finished())
    streams[0].put_finished(finished())
    streams[1].put_finished(finished())
    assert crowd.size == 2, "the second one's other choice goes on"
    streams[1].put_finished(finished(choice=1))
    put(streams[1], [3])
    assert crowd.size == 1


async def wake_ups_in_a_crowd(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a reader whose tokens gather; it must get them all the same."""
    stream, calls = TokenStream(1, Crowd(5)), 0
    put(stream, [0])
    await stream.next(Coalescing())
    more = stream._more

    async def counted(coalescing: Coalescing) -> None:
        nonlocal calls
        calls += 1
        await more(coalescing)

    monkeypatch.setattr(stream, "_more", counted)
    for token in range(20):
        waiting = asyncio.ensure_future(stream.next(Coalescing()))
        await asyncio.sleep(0)
        put(stream, [token])
        put(stream, [token + 1])
        assert ids(await waiting) == [token, token + 1]
    return calls


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_reader_in_a_crowd_wakes_twice_for_a_slice(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop's timers count whole milliseconds, and may be early by the clock."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(wake_ups_in_a_crowd(monkeypatch)) == 40
