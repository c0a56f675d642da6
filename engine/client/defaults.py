"""What generation_config.json says about requests that leave things open."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.client.files import read_optional_json
from engine.errors import ModelLoadError

MAX_TEMPERATURE = 100.0
REPETITION_PENALTIES = (0.01, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults hold only where the model asks for sampling (``do_sample``); its
    repetition penalty always does.

    ``chat_stop`` (``stop_strings``) ends a chat's answer where the request names none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    chat_stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature {self.temperature} is out of range")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"top_p {self.top_p} or top_k {self.top_k} is out of range")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} is out of range")
        low, high = REPETITION_PENALTIES
        if not low <= self.repetition_penalty <= high:
            raise ValueError(f"repetition_penalty {self.repetition_penalty} is out of range")

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationDefaults":
        """Reads generation_config.json, and config.json for the end token."""
        found = read_optional_json(folder / "generation_config.json")
        config = read_optional_json(folder / "config.json")
        sampling = found if found.get("do_sample") else {}
        try:
            return cls(
                temperature=float(sampling.get("temperature", 1.0 if sampling else 0.0)),
                top_p=float(sampling.get("top_p", 1.0)),
                top_k=int(sampling.get("top_k", 50 if sampling else 0)),
                min_p=float(sampling.get("min_p") or 0.0),
                repetition_penalty=float(found.get("repetition_penalty") or 1.0),
                eos_token_ids=_ids(found.get("eos_token_id", config.get("eos_token_id"))),
                chat_stop=_strings(found.get("stop_strings")),
            )
        except (OverflowError, TypeError, ValueError) as error:
            raise ModelLoadError(f"{folder / 'generation_config.json'}: {error}") from error


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(i) for i in value) if isinstance(value, list) else (int(value),)


def _strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value or []
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop_strings must be non-empty strings, not {value!r}")
    return tuple(strings)
