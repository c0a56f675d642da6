import random
import struct

import pytest

from engine.frames import Frames, frame


@pytest.mark.parametrize("seed", range(20))
def test_messages_come_out_whole_however_they_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    messages = [rng.randbytes(rng.choice([0, 1, 3, 4, 5, 300, 70_000])) for _ in range(9)]
    stream = b"".join(map(frame, messages))
    frames, found = Frames(), []
    while stream:
        size = rng.choice([1, 2, 5, 4096, 1 << 16])
        found += frames.feed(stream[:size])
        stream = stream[size:]
    assert found == messages


def test_an_unfinished_message_waits() -> None:
    frames = Frames()
    assert list(frames.feed(frame(b"one") + frame(b"two")[:-1])) == [b"one"]
    assert list(frames.feed(b"")) == []
    assert list(frames.feed(b"o" + struct.pack("<I", 0))) == [b"two", b""]
