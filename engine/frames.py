"""Messages in a stream of bytes: four bytes of length, little-endian, then the message."""

import struct
from collections.abc import Iterator

_LENGTH = struct.Struct("<I")


def frame(message: bytes) -> bytes:
    """A message as it is sent. Raises ``struct.error``: it has 4 GiB or more."""
    return _LENGTH.pack(len(message)) + message


class Frames:
    """Puts messages together from pieces of any size. Keeps an unfinished message."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that ``data`` completes, in order."""
        self._pending += data
        while len(self._pending) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._pending)[0]
            if len(self._pending) < end:
                return
            message = bytes(self._pending[_LENGTH.size : end])
            del self._pending[:end]
            yield message
