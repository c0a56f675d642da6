"""What was measured, repetition by repetition, and medians of it."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(kw_only=True)
class Measured:
    """One repetition of one engine, or several put together: figures by name."""

    version: str
    detail: dict[str, Any]
    tokens: list[list[int]]
    figures: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_answer(cls, line: dict[str, Any]) -> Self:
        """From a script's line of JSON (``bench.peers.common.Answer``)."""
        detail = dict(line["detail"])
        figures = {"prefill_tps": line["prefill_tps"]}
        figures |= {f"decode{batch}_tps": tps for batch, tps in line["decode_tps"].items()}
        for name in ("dram_gb_s", "int8_gop_s"):
            if name in detail:
                figures[name] = detail.pop(name)
        wrapped = {name: [float(value)] for name, value in figures.items()}
        return cls(version=line["version"], detail=detail, tokens=line["tokens"], figures=wrapped)

    def add_served(self, line: dict[str, Any]) -> None:
        """The same engine through gRPC: a line of ``bench.cpu_server``."""
        for name in ("tps", "share", "client_cpu"):
            for batch, value in line[name].items():
                self.figures[f"grpc{batch}_{name}"] = [value]
        for name in ("pss_bytes", "weight_bytes", "kv_bytes"):
            self.figures[name] = [float(line[name])]

    def value(self, name: str) -> float:
        """The median over the repetitions. ``KeyError`` where it was not measured."""
        return statistics.median(self.figures[name])

    def spread(self, name: str) -> float:
        """Largest less smallest, as a share of the median."""
        values = self.figures[name]
        return (max(values) - min(values)) / self.value(name)

    def agreement(self, reference: list[list[int]]) -> int:
        """Of how many prompts the greedy answers are the same, of ``len(reference)``."""
        return sum(a == b for a, b in zip(self.tokens, reference, strict=True))


@dataclass(kw_only=True)
class Results:
    """All of a run, by model and engine."""

    commit: str
    threads: int
    prompt: int
    new: int
    repeats: int
    models: dict[str, dict[str, Measured]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, model: str, engine: str, measured: Measured) -> None:
        """One repetition more."""
        known = self.models.setdefault(model, {}).setdefault(engine, measured)
        if known is not measured:
            for name, values in measured.figures.items():
                known.figures.setdefault(name, []).extend(values)

    def fail(self, model: str, engine: str, message: str) -> None:
        """A repetition in which an engine could not be measured: the report says so."""
        self.models.setdefault(model, {})
        self.failures.setdefault(model, {})[engine] = message

    def of(self, model: str, engine: str) -> Measured:
        """All of its repetitions. ``KeyError`` where there are none."""
        return self.models[model][engine]

    def figures(self) -> dict[str, object]:
        """Medians, flat."""
        flat: dict[str, object] = {"commit": self.commit, "threads": self.threads}
        for model, engines in self.models.items():
            for engine, measured in engines.items():
                for name in measured.figures:
                    flat[f"{model} {engine} {name}"] = measured.value(name)
        return flat

    def write(self, file: Path) -> None:
        """All of it as JSON."""
        file.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Self:
        """What ``write`` wrote."""
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields["models"] = {
            model: {name: Measured(**measured) for name, measured in engines.items()}
            for model, engines in fields["models"].items()
        }
        return cls(**fields)
