"""How the commands end: exit codes, and the one line that says why."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compress.errors import CompressError
from compress.progress import Progress
from engine.errors import ModelLoadError

USER_ERROR = 2
REFUSED = 3
INTERRUPTED = 130


@contextmanager
def exit_codes(progress: Progress, kept: Callable[[], str]) -> Iterator[None]:
    """``kept`` says what an interrupted run leaves; "" where only the interrupt's notes know."""
    try:
        yield
    except (CompressError, ModelLoadError) as error:
        progress.error(" ".join(str(error).split()))
        sys.exit(USER_ERROR)
    except KeyboardInterrupt as interrupt:
        left = [*filter(None, (kept(),)), *getattr(interrupt, "__notes__", ())]
        progress.error(f"interrupted: {'; '.join(left) or 'nothing was written'}")
        sys.exit(INTERRUPTED)


def exit_on_sigterm() -> None:
    """As an exception it unwinds, so that temporary folders go."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
