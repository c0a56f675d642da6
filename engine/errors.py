"""What the engine raises. Each class is one answer that a caller can act upon.

The engine knows no gRPC: the server's error table turns these classes into statuses.
"""


class EngineError(Exception):
    """Base of all. ``str(error)`` is one line that may be shown to the caller."""


class InvalidRequest(EngineError):
    """A parameter is out of range, or two of them contradict each other.

    ``field`` is the parameter's path in the request, such as ``sampling.top_p``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class NotServed(EngineError):
    """The request asks for something known that this server does not do (yet)."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class UnknownModel(EngineError):
    """The request names a model or variant that is not served."""

    def __init__(self, name: str) -> None:
        super().__init__("no such model or variant is served")
        self.name = name


class Overloaded(EngineError):
    """Too much is queued. ``retry_after_s`` says when it is worth trying again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(EngineError):
    """The engine is starting, restarting, draining or gone; another try may succeed."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(EngineError):
    """The caller's deadline passed before the request ended."""


class GenerationFailed(EngineError):
    """The engine accepted the request and could not finish it."""


class ModelLoadError(EngineError):
    """The model folder cannot be loaded; the message names the file and the remedy."""
