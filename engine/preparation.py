"""Requests that wait for their constraint: it is compiled in a thread, beside the steps."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from engine.errors import EngineError
from engine.types import Constraint, Request

# The compiler has limits of its own; this one is for a machine that is far too slow.
TIME_LIMIT_S = 10.0


@dataclass(slots=True)
class Prepared:
    """A request that may go on, unless there is an ``error``.

    ``cancelled`` are the choices that were cancelled meanwhile, None for all.
    """

    request: Request
    done: Future[object]
    began: float
    cancelled: list[int | None] = field(default_factory=list)
    error: str = ""


class Preparation:
    """Not thread-safe, but for ``compile``, which it calls in its thread, one after another."""

    def __init__(
        self,
        compile: Callable[[Constraint], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._compile = compile
        self._clock = clock
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="constraints")
        self._waiting: dict[str, Prepared] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def add(self, request: Request, constraint: Constraint) -> None:
        """Begins to compile."""
        done: Future[object] = self._threads.submit(self._compile, constraint)
        self._waiting[request.id] = Prepared(request, done, self._clock())

    def cancel(self, request_id: str, choice: int | None) -> None:
        """Remembers it until the request comes out. Unknown ids are ignored."""
        if request_id in self._waiting:
            self._waiting[request_id].cancelled.append(choice)

    def take(self) -> list[Prepared]:
        """Those that wait no longer, in the order of their arrival."""
        ready = [each for each in self._waiting.values() if self._is_over(each)]
        for each in ready:
            del self._waiting[each.request.id]
            each.error = _error(each.done)
        return ready

    def wait(self, seconds: float) -> None:
        """Until the first is ready."""
        wait([each.done for each in self._waiting.values()], seconds, "FIRST_COMPLETED")

    def _is_over(self, prepared: Prepared) -> bool:
        return prepared.done.done() or self._clock() - prepared.began > TIME_LIMIT_S


def _error(done: Future[object]) -> str:
    if done.cancel() or not done.done():
        return f"took longer than {TIME_LIMIT_S:.0f} s to compile"
    error = done.exception()
    if error is None:
        return ""
    return str(error) if isinstance(error, EngineError) else "cannot be compiled"
