"""``report.json`` beside an artefact: the verdict and what it rests on. Imports no torch."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from compress.errors import CompressError, writing
from compress.files import write_whole
from compress.gate.config import Gate
from compress.gate.decision import Outcome
from compress.gate.verdict import Verdict
from compress.measure.figures import Evaluation
from compress.sources import MANIFEST_NAME, REPORT_NAME

FORMAT_VERSION = 1
UNKNOWN_ORIGINAL = "the original is taken on trust, for the artefact has no hashes of it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A decoder layer that got its precision back, and what it cost before, in nats per token.

    ``contribution`` None: it alone gave NaN or infinite logits.
    """

    name: str
    before: str
    after: str
    contribution: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One verdict with its evidence. ``key`` names artefact, data, engine and processor.

    ``kept_share`` of the targeted weights keep the scheme asked for. ``original_known``: hashes
    say that the artefact was made of this original.
    """

    key: str
    gate: Gate
    verdict: Verdict
    evaluation: Evaluation
    engine: Mapping[str, str]
    restored: tuple[Restored, ...] = ()
    kept_share: float = 1.0
    original_known: bool = True

    @property
    def refused(self) -> bool:
        """Whether the artefact must not be served."""
        return self.gate.mode == "enforce" and self.verdict.outcome is not Outcome.PASS

    def line(self) -> str:
        """For people: one line."""
        text = f"{self.verdict.outcome.value}: {self.verdict.sentence}"
        if self.restored:
            text += f"; restored: {', '.join(one.name for one in self.restored)}"
        text += f"; {self.verdict.remedy}" if self.verdict.remedy else ""
        return text if self.original_known else f"{text}; {UNKNOWN_ORIGINAL}"

    def event(self) -> dict[str, Any]:
        """For the ``done`` event."""
        quality = self.evaluation.quality
        return {
            "mode": self.gate.mode,
            "verdict": self.verdict.outcome.value,
            "refused": self.refused,
            "line": self.line(),
            "data_sha256": self.evaluation.data_sha256,
            "tokens": 0 if quality is None else quality.tokens,
            "mean_kl_nats": None if quality is None else quality.kl.value,
            "perplexity": None if quality is None else quality.artefact_perplexity,
            "original_perplexity": None if quality is None else quality.original_perplexity,
            "restored": [one.name for one in self.restored],
            "decode": {str(one.batch): one.artefact for one in self.evaluation.speed},
        }


def write_report(report: Report, folder: Path) -> None:
    """Writes ``report.json``, and into ``venturi.json``, where there is one, the verdict and the
    original's entropy, which serving compares with.

    An artefact in a folder that only others may write stays as it is.
    """
    text = json.dumps(
        {"format_version": FORMAT_VERSION, **asdict(report)}, indent=2, allow_nan=False
    )
    if not os.access(folder, os.W_OK):
        return
    with writing(folder, "free some space, or name another folder"):
        write_whole(folder / REPORT_NAME, text + "\n")
        _write_into_manifest(report, folder / MANIFEST_NAME)


def read_report(folder: Path) -> Report:
    """Inverse of ``write_report``. Raises ``CompressError``."""
    path = folder / REPORT_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(value, Report)
    except OSError as error:
        raise CompressError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, msgspec.ValidationError) as error:
        raise CompressError(f"{path} is no report of this version: {error}") from error


def _write_into_manifest(report: Report, path: Path) -> None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    verdict = {"outcome": report.verdict.outcome.value, "line": report.line(), "key": report.key}
    found = {"verdict": verdict, "reference_entropy": asdict(report.evaluation.entropy)}
    write_whole(path, json.dumps({**manifest, **found}, indent=2) + "\n")
