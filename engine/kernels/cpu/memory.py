"""Memory for packed weights and for what lives no longer than a call."""

import ctypes
import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_LINE = 64


def aligned_empty(nbytes: int) -> Tensor:
    """uint8 [nbytes], beginning at a cache line; given back with the tensor.

    Large ones lie in huge pages, which spare look-ups of addresses. What would fill only a part
    of such a page stays in small ones. Raises ``RuntimeError`` where there is no memory, as
    torch does.
    """
    if nbytes < _HUGE_PAGE:
        whole = torch.empty(nbytes + _LINE, dtype=torch.uint8)
        begin = -whole.data_ptr() % _LINE
        return whole[begin : begin + nbytes]
    try:
        pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"no memory for {nbytes} bytes") from error
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -whole.data_ptr() % _HUGE_PAGE
    with suppress(OSError):  # a kernel may have no huge pages
        pages.madvise(mmap.MADV_HUGEPAGE, begin, nbytes // _HUGE_PAGE * _HUGE_PAGE)
    return whole[begin : begin + nbytes]


def give_back() -> None:
    """Gives the system what was freed between allocations that live on; only glibc keeps that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Scratch(threading.local):
    """Bytes that each thread keeps for its next call; they grow to the largest that was asked."""

    def __init__(self) -> None:
        self._bytes = aligned_empty(_LINE)

    def __call__(self, *sizes: int) -> list[int]:
        """Addresses of buffers of these sizes in bytes, valid until this thread's next call."""
        steps = [-(-size // _LINE) * _LINE for size in sizes]
        if sum(steps) > len(self._bytes):
            self._bytes = aligned_empty(sum(steps))
        begin = self._bytes.data_ptr()
        return [begin + sum(steps[:index]) for index in range(len(steps))]


scratch = Scratch()
