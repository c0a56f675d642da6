"""This process's private memory, as Linux counts it."""

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_INTERVAL_S = 0.01


def rss_anon_bytes() -> int | None:
    """RssAnon: resident memory without mapped files. None where the system has no such count."""
    try:
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def available_bytes() -> int | None:
    """MemAvailable of the system. None where it has no such count."""
    try:
        for line in _MEMINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


class PeakMemory:
    """Samples RssAnon in a thread while the ``with`` block runs."""

    def __init__(self) -> None:
        self.baseline = rss_anon_bytes()
        self.peak = self.baseline
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while self.baseline is not None and not self._stop.wait(_INTERVAL_S):
            self.peak = max(self.peak or 0, rss_anon_bytes() or 0)
