"""The server's configuration: flags > environment (VENTURI_*) > file > defaults."""

import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from engine.client.heartbeat import DEFAULT_SILENCE_S
from engine.formats import QUANTIZATION_FILES

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "venturi-mini"
NO_RECIPE = "none"
DEFAULT_PORT = 50051
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class ConfigError(Exception):
    """One line that names the setting and the remedy."""


def made_by(folder: Path) -> str | None:
    """Name of the recipe that made a compressed folder, None for an original.

    Folders of other programs have the name of their quantisation.
    """
    found = _object(folder / "venturi.json").get("recipe")
    if isinstance(found, dict) and found.get("name"):
        return str(found["name"])
    quantization = _object(folder / "config.json").get("quantization_config")
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "quantized"))
    files = QUANTIZATION_FILES.items()
    return next((name for name, file in files if (folder / file).is_file()), None)


def _object(path: Path) -> dict[str, Any]:
    # Whether a file is sound is judged by those who load it.
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def parse_size(value: Any) -> Any:
    """Bytes from 1073741824, "1GiB" or "500M"."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError("give a size such as 500M or 1GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def parse_port(value: Any) -> Any:
    """Kubernetes sets VENTURI_PORT=tcp://ADDRESS:PORT for a Service named venturi."""
    return DEFAULT_PORT if isinstance(value, str) and value.startswith("tcp://") else value


Port = Annotated[int, BeforeValidator(parse_port), Field(ge=0, le=65535)]
Size = Annotated[int, BeforeValidator(parse_size)]


class ServerConfig(BaseSettings):
    """Everything that ``venturi serve`` can be told."""

    model_config = SettingsConfigDict(env_prefix="VENTURI_", extra="forbid", frozen=True)

    model: Path = EMBEDDED_MODEL
    name: str = ""
    recipe: str = "w8a8"
    scale: bool = False
    allow_slow: bool = False
    cache_dir: Path | None = None
    gate: Literal["off", "warn", "enforce"] | None = None
    original: Path | None = None
    host: str = "127.0.0.1"
    port: Port = DEFAULT_PORT
    kv_dtype: Literal["auto", "int8", "fp32"] = "auto"
    kv_memory: Size = Field(256 << 20, ge=1 << 16)
    kv_blocks: int | None = Field(None, ge=1)
    max_requests: int = Field(256, ge=1)
    # 32 full steps, or 64 tokens for each of max_requests: beyond that a first token is so far
    # off that the caller had better ask elsewhere, or later.
    max_queued_tokens: int = Field(16384, ge=1)
    max_sequences: int = Field(64, ge=1, le=4096)
    token_budget: int = Field(512, ge=1, le=1 << 20)
    speculative_tokens: int = Field(4, ge=0, le=16)
    monitor_steps: int = Field(64, ge=0)
    monitor_gap: float = Field(0.5, ge=0, lt=math.inf)
    alarm_entropy: float = Field(3.0, gt=0, allow_inf_nan=False)
    alarm_non_finite: int = Field(1, ge=1)
    fallback: Literal["off", "non-finite", "alarm"] = "off"
    threads: int | None = Field(None, ge=1, le=os.cpu_count() or 1)
    reflection: bool | None = None
    drain_timeout: float = Field(30.0, ge=0)
    engine_timeout: float = Field(DEFAULT_SILENCE_S, gt=0, le=86400)
    request_timeout: float = Field(600.0, gt=0)
    write_timeout: float = Field(30.0, gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _a_folder(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("name a folder")
        return value

    @model_validator(mode="after")
    def _sequences_fit_a_step(self) -> "ServerConfig":
        if self.max_sequences > self.token_budget:
            raise ValueError("--max-sequences must not be above --token-budget")
        return self

    @model_validator(mode="after")
    def _scale_has_recipes_and_a_gate(self) -> "ServerConfig":
        if self.scale and "recipe" in self.model_fields_set:
            raise ValueError("--scale tries recipes of its own: leave --recipe out")
        if self.scale and self.gate not in (None, "enforce"):
            raise ValueError(f"--scale needs the gate: leave --gate {self.gate} out")
        return self

    @model_validator(mode="after")
    def _original_is_for_something(self) -> "ServerConfig":
        gated = self.gate in ("warn", "enforce")
        if self.original is not None and not gated and self.fallback == "off":
            raise ValueError("--original is what --gate and --fallback need: add one of them")
        return self

    @property
    def original_folder(self) -> Path:
        """Of what is compressed, now or already; the model's own where nobody said."""
        return self.model if self.original is None else self.original

    @property
    def served_name(self) -> str:
        """Name under which clients ask for the model."""
        return self.name or self.model.resolve().name

    @property
    def variant(self) -> str:
        """Name of what the recipe makes of it, or of the recipe that made the folder.

        With ``scale`` that of the recipe which is found, once it is.
        """
        if self.scale:
            return "scale"
        own = made_by(self.model)
        if own is not None and self.serves_as_it_is:
            return own
        return "original" if self.recipe == NO_RECIPE else Path(self.recipe).stem

    @property
    def serves_as_it_is(self) -> bool:
        """Whether the folder is served without compressing: asked for, or done already.

        Another recipe than the folder's own, asked for by name, is left to ``compress`` to refuse.
        """
        own = made_by(self.model)
        wanted = "recipe" in self.model_fields_set and self.recipe != own
        return self.recipe == NO_RECIPE or (own is not None and not wanted and not self.scale)

    @property
    def serves_reflection(self) -> bool:
        """On for the embedded model unless switched off."""
        return self.model == EMBEDDED_MODEL if self.reflection is None else self.reflection

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file."""
        file = YamlConfigSettingsSource(settings_cls)
        return init_settings, env_settings, file


def load_config(flags: dict[str, Any], file: Path | None) -> ServerConfig:
    """The resolved configuration. Raises ``ConfigError``."""
    if file is not None and not file.is_file():
        raise ConfigError(f"{file} is not a file: name a YAML file with --config or VENTURI_CONFIG")

    class WithFile(ServerConfig):
        model_config = SettingsConfigDict(yaml_file=file)

    _refuse_misspelt_variables()
    try:
        return WithFile(**flags)
    except ValidationError as error:
        raise ConfigError(_one_line(error, file)) from error
    except Exception as error:  # the YAML reader raises its own kinds
        raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def _refuse_misspelt_variables() -> None:
    """Other programs may use the prefix too, so only a name near to a setting is an error."""
    known = [f"VENTURI_{name.upper()}" for name in ServerConfig.model_fields]
    for name in os.environ:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
        if name.startswith("VENTURI_") and name not in known and near:
            raise ConfigError(f"{name} is no setting; did you mean {near[0]}?")


def _one_line(error: ValidationError, file: Path | None) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, ServerConfig.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{file}: unknown setting {name!r}{hint}"
    reason = first["msg"].removeprefix("Value error, ")
    if not name:
        return reason
    flag = f"--{name.replace('_', '-')}"
    return f"{flag} (VENTURI_{name.upper()}): {reason}, not {first.get('input')!r}"
