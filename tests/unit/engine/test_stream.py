"""Token streams: in order, complete, and coalesced as asked."""

import asyncio

import pytest

from engine.client.stream import Coalescing, Slice, TokenStream
from engine.types import Finished, FinishReason


def finished(reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished(id="a", reason=reason, scheduled_at=None, first_token_at=None, finished_at=1.0)


def put(stream: TokenStream, tokens: range | list[int]) -> None:
    for token in tokens:
        stream.put_token(token)


async def read(stream: TokenStream, coalescing: Coalescing) -> list[Slice]:
    slices = [await stream.next(coalescing)]
    while slices[-1].finished is None:
        slices.append(await stream.next(coalescing))
    return slices


async def test_what_waits_comes_at_once_and_in_order() -> None:
    stream = TokenStream()
    put(stream, range(5))
    assert await stream.next(Coalescing()) == Slice([0, 1, 2, 3, 4], None)


async def test_no_slice_exceeds_max_tokens_and_the_end_comes_with_the_last() -> None:
    stream = TokenStream()
    put(stream, range(10))
    stream.put_finished(finished())
    slices = await read(stream, Coalescing(max_tokens=4))
    assert [one.tokens for one in slices] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
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
    assert (await waiting).tokens == [2]


async def test_the_first_token_never_waits_for_others() -> None:
    stream, slow = TokenStream(), Coalescing(max_tokens=8, max_delay=60.0)
    put(stream, [1])
    async with asyncio.timeout(5):
        assert (await stream.next(slow)).tokens == [1]


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
        assert (await waiting).tokens == [1, 2, 3]


async def test_later_tokens_gather_until_the_delay_is_over() -> None:
    stream, coalescing = TokenStream(), Coalescing(max_tokens=99, max_delay=0.02)
    put(stream, [0])
    await stream.next(coalescing)
    put(stream, [1])
    async with asyncio.timeout(5):
        assert (await stream.next(coalescing)).tokens == [1]
    put(stream, [2])
    stream.put_finished(finished())
    assert (await stream.next(coalescing)).tokens == [2]


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
    assert (last.tokens, last.finished) == ([1], finished())


async def test_a_reader_that_gave_up_finds_its_tokens_later() -> None:
    stream, slow = TokenStream(), Coalescing(max_tokens=99, max_delay=60.0)
    put(stream, [0])
    await stream.next(slow)
    put(stream, [1])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.next(slow), 0.01)
    async with asyncio.timeout(5):
        assert (await stream.next(Coalescing())).tokens == [1]


@pytest.mark.parametrize("values", [{"max_tokens": 0}, {"max_tokens": -1}])
def test_a_slice_without_tokens_cannot_be_asked_for(values: dict[str, int]) -> None:
    """It would never come to an end, and hold the event loop for ever."""
    with pytest.raises(ValueError, match="max_tokens"):
        Coalescing(**values)  # type: ignore[arg-type]
