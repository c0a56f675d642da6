"""What an evaluation found, as it is reported and saved. Imports no torch."""

from dataclasses import dataclass

# Of the upper end of an interval: 95 % lie between both ends.
LEVEL = 0.975
# ``data`` of an evaluation on what the original wrote.
GENERATED = "generated"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; larger is worse. ``items`` are documents or questions."""

    value: float
    low: float
    high: float
    items: int
    standard_error: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % bootstrap interval over documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """``tokens`` counts predictions; ``kl`` is the mean of KL(original || artefact) in nats,
    ``flips`` the share of predictions whose most likely token changed.
    """

    tokens: int
    original_perplexity: float
    artefact_perplexity: float
    perplexity_ratio: Interval
    kl: Interval
    flips: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Entropy:
    """Of the original's predictions in nats: ``mean`` and standard ``deviation`` over tokens."""

    mean: float
    deviation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models, as found in memory; the speed is that of scoring windows."""

    folder: str
    weights: str
    head: str
    kv_dtype: str
    weight_bytes: int
    tokens_per_second: float
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Answers of both models to the same questions.

    ``lost`` became wrong, ``gained`` right; ``chance`` is the accuracy of guessing.
    """

    name: str
    items: int
    chance: float
    original_correct: int
    lost: int
    gained: int

    @property
    def original_accuracy(self) -> float:
        """A share."""
        return self.original_correct / self.items

    @property
    def artefact_accuracy(self) -> float:
        """A share."""
        return (self.original_correct - self.lost + self.gained) / self.items


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second of generating ``batch`` sequences at a time.

    Memory is that of the weights and of the sequences' keys and values.
    """

    batch: int
    original: float
    artefact: float
    original_bytes: int
    artefact_bytes: int

    @property
    def ratio(self) -> float:
        """Above 1 the artefact is faster."""
        return self.artefact / self.original


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """``data`` names the text, ``window`` is in tokens, ``documents`` counts what was used.

    On ``broken`` documents the artefact gave NaN or infinite logits; ``quality`` and ``kl`` are
    None then, for nothing can be said of their size. ``entropy`` is what serving compares with.
    ``speed`` is empty where not measured.
    """

    original: Side
    artefact: Side
    data: tuple[str, ...]
    data_sha256: str
    window: int
    documents: int
    broken: int
    quality: Quality | None
    kl: Estimate | None
    entropy: Entropy
    tasks: tuple[TaskResult, ...] = ()
    speed: tuple[Speed, ...] = ()

    @property
    def slower(self) -> bool:
        """Whether the artefact was slower in every regime that was measured."""
        return bool(self.speed) and all(one.ratio < 1 for one in self.speed)
