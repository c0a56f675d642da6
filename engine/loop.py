"""Drives a core: takes messages in, steps while there is work, sends events out."""

from collections.abc import Callable

from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.messages import (
    Cancel,
    Events,
    FromEngine,
    GetStats,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
)
from engine.types import Finished, FinishReason, StepOutput

# Returns what has arrived; with True it may wait for the first message.
Receive = Callable[[bool], list[ToEngine]]
Send = Callable[[FromEngine], None]


def run_loop(core: EngineCore, receive: Receive, send: Send) -> None:
    """Runs until a ``Shutdown`` arrives. Owns the core's thread."""
    while True:
        for message in receive(not core.has_work):
            if isinstance(message, Shutdown):
                return
            _handle(core, message, send)
        if core.has_work and (output := core.step()):
            send(Events(output))


def _handle(core: EngineCore, message: ToEngine, send: Send) -> None:
    match message:
        case Submit(request=request):
            try:
                core.submit(request)
            except InvalidRequest as error:
                choices = range(max(1, request.choices))
                refused = [_refused(request.id, choice, str(error)) for choice in choices]
                send(Events(StepOutput(finished=refused)))
        case Cancel(id=request_id, choice=choice):
            core.cancel(request_id, choice)
        case GetStats():
            send(Stats(core.stats()))


def _refused(request_id: str, choice: int, message: str) -> Finished:
    # The front end checks before it submits, so this is its terminal event of last resort.
    return Finished(
        id=request_id,
        choice=choice,
        reason=FinishReason.ERROR,
        scheduled_at=None,
        first_token_at=None,
        finished_at=0.0,
        message=message,
    )
