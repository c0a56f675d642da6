"""The gate's verdict on what is served, as the compressor told it."""

from dataclasses import dataclass
from typing import Any

from venturi.v1 import model_pb2 as pb


class Refused(Exception):
    """The gate lets nothing be served; the message says why and what can be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """``line`` is the verdict in a sentence. Figures are None where logits were no numbers.

    ``decode``: tokens per second by the number of sequences, {} where that was not timed.
    """

    verdict: str
    refused: bool
    line: str
    data_sha256: str
    tokens: int
    mean_kl_nats: float | None
    perplexity: float | None
    original_perplexity: float | None
    restored: tuple[str, ...]
    decode: dict[str, float]

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> "GateResult":
        """From ``gate`` of the compressor's ``done`` event."""
        names = [name for name in cls.__dataclass_fields__ if name != "restored"]
        return cls(**{name: event[name] for name in names}, restored=tuple(event["restored"]))

    @property
    def passed(self) -> bool:
        """Whether the artefact was shown to be good enough."""
        return self.verdict == "pass"

    def speed(self) -> pb.MeasuredSpeed:
        """The contract's message."""
        return pb.MeasuredSpeed(**{f"decode_{batch}": rate for batch, rate in self.decode.items()})

    def to_proto(self) -> pb.MeasuredQuality:
        """The contract's message."""
        return pb.MeasuredQuality(
            mean_kl_nats=self.mean_kl_nats,
            perplexity=self.perplexity,
            original_perplexity=self.original_perplexity,
            tokens=self.tokens,
            data_sha256=self.data_sha256,
            verdict=self.verdict,
            explanation=self.line,
            restored_layers=self.restored,
        )
