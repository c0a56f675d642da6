"""The commands ``generate``, ``health``, ``model`` and ``lm-eval``, and options that they share."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import Any, TypeVar, Unpack

import click

from venturi._client import Client
from venturi._errors import APIConnectionError, APITimeoutError, VenturiError
from venturi._explain import Unreachable, connect
from venturi._options import GenerateOptions, Prompt
from venturi._types import Generation, Model, Monitoring

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_POLL_S = 0.25
_GENERATE_OPTIONS: list[Callable[[Any], Any]] = [
    click.option("--model", metavar="NAME", help="Model, as name or name@variant."),
    click.option("--max-tokens", type=int, metavar="N", help="Most tokens to generate."),
    click.option("--temperature", type=float, metavar="T", help="0 is greedy."),
    click.option("--top-p", type=float, metavar="P", help="Share of probability to sample from."),
    click.option("--top-k", type=int, metavar="K", help="Tokens to sample from; 0 is all."),
    click.option("--min-p", type=float, metavar="P", help="Least share of the likeliest token's."),
    click.option("--seed", type=int, metavar="N", help="Makes sampling repeatable."),
    click.option(
        "--stop",
        multiple=True,
        callback=lambda _context, _option, texts: texts or None,
        metavar="TEXT",
        help="Ends the text; repeatable.",
    ),
    click.option(
        "--ignore-eos", is_flag=True, default=None, help="Go on to --max-tokens, whatever comes."
    ),
    click.option("--regex", metavar="REGEX", help="What the text must match."),
    click.option(
        "--json-schema",
        type=click.File(encoding="utf-8"),
        callback=lambda _context, _option, file: file and file.read(),
        metavar="FILE",
        help="JSON schema that the text must match.",
    ),
]


def server_options(timeout_s: float = 600.0) -> Callable[[FunctionT], FunctionT]:
    """Adds ``--target`` and ``--timeout``."""
    target = click.option("--target", metavar="HOST:PORT", help="Server to call.")
    timeout = click.option(
        "--timeout",
        type=float,
        default=timeout_s,
        show_default=True,
        metavar="SECONDS",
        help="Longest wait for an answer.",
    )
    return lambda function: target(timeout(function))


def generate_options(function: FunctionT) -> FunctionT:
    """Adds the options of a request; their names are those of ``GenerateOptions``."""
    for option in reversed(_GENERATE_OPTIONS):
        function = option(function)
    return function


@click.command()
@click.argument("prompt")
@generate_options
@click.option("--chat/--raw", "as_chat", help="Use the model's chat template. [raw]")
@click.option("--json", "as_json", is_flag=True, help="Print the whole response as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print token counts and times to stderr.")
@server_options()
def generate(
    prompt: str,
    as_chat: bool,
    as_json: bool,
    verbose: bool,
    target: str | None,
    **options: Unpack[GenerateOptions],
) -> None:
    """Generate text from PROMPT, or from stdin with "-"."""
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    given: Prompt = [{"role": "user", "content": prompt}] if as_chat else prompt
    with connect(target) as client:
        if as_json:
            response = client.generate(given, **options)
            click.echo(json.dumps(asdict(response), indent=2))
        else:
            response = print_stream(client, given, options)
    if verbose:
        click.echo(_statistics(response), err=True)


def print_stream(client: Client, prompt: Prompt, options: GenerateOptions) -> Generation:
    """Prints a response as it comes, and a newline after whatever was printed."""
    with client.stream(prompt, **options) as stream:
        try:
            for text in stream.text_stream:
                click.echo(text, nl=False)
            response = stream.get_final_response()
        except VenturiError as error:
            if error.partial:
                click.echo()
            raise
    click.echo()
    return response


def _statistics(response: Generation) -> str:
    usage, timings = response.usage, response.timings
    parts = [
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens",
        f"finish {response.finish_reason}",
    ]
    if timings.ttft_s is not None:
        parts.append(f"first token {timings.ttft_s:.3f} s")
    if timings.tpot_s:
        parts.append(f"{1 / timings.tpot_s:.1f} tokens/s")
    parts.append(f"{response.model}@{response.variant}")
    return ", ".join([*parts, f"request {response.request_id}"])


@click.command()
@click.option("--service", default="", metavar="NAME", help="Service to ask about. [all]")
@click.option("--wait", type=float, default=0.0, metavar="SECONDS", help="Wait until it serves.")
@server_options(timeout_s=10.0)
def health(service: str, wait: float, target: str | None, timeout: float) -> int:
    """Print SERVING or NOT_SERVING.

    The exit code is 0 or 1; 2 when no server answers.
    """
    end = time.monotonic() + wait
    with connect(target, timeout) as client:
        while not (serving := _serving(client, service, end)) and time.monotonic() < end:
            time.sleep(_POLL_S)
    click.echo("SERVING" if serving else "NOT_SERVING")
    return 0 if serving else 1


def _serving(client: Client, service: str, end: float) -> bool:
    try:
        return client.health(service)
    except (APIConnectionError, APITimeoutError):
        if time.monotonic() >= end:
            raise
        return False


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything, layers too, as JSON.")
@server_options()
def model(name: str | None, as_json: bool, target: str | None, timeout: float) -> None:
    """Print what is served: all models, or name@variant."""
    with connect(target, timeout) as client:
        models = [client.model(name)] if name else client.models()
    if as_json:
        click.echo(json.dumps([asdict(each) for each in models], indent=2))
    else:
        click.echo("\n\n".join(_describe(each) for each in models))


def _describe(served: Model) -> str:
    precision, cache, origin = served.precision, served.kv_cache, served.provenance
    quality, speed = served.quality, served.speed
    rows = {
        "model": f"{served.name}@{served.variant}",
        "architecture": served.architecture,
        "parameters": f"{served.parameters:,}" if served.parameters else "",
        "context": f"{served.context_length:,} tokens" if served.context_length else "",
        "weights": f"{precision.weights}, {precision.weight_bytes / 1e6:,.1f} MB"
        if precision.weights
        else "",
        "activations": precision.activations,
        "kernels": ", ".join(precision.kernels),
        "kv cache": f"{cache.dtype}, {cache.blocks * cache.block_size:,} tokens"
        if cache.dtype
        else "",
        "recipe": origin.recipe,
        "format": origin.format,
        "quality": f"{quality.verdict or 'measured'}{_kl(quality.mean_kl_nats)}" if quality else "",
        "gate": quality.explanation if quality else "",
        "monitoring": _activity(served.monitoring) if served.monitoring else "",
        "alarm": "; ".join(alarm.text for alarm in served.monitoring.alarms)
        if served.monitoring
        else "",
        "fallback": f"from {served.fallback.variant}: {served.fallback.reason}"
        if served.fallback
        else "",
        "speed": f"{speed.decode_1:.1f} tokens/s" if speed and speed.decode_1 else "",
    }
    return "\n".join(f"{label:<13}{value}" for label, value in rows.items() if value)


def _activity(seen: Monitoring) -> str:
    if not seen.sampled_steps:
        return "no step was looked at yet"
    parts = [f"{seen.sampled_steps:,} steps looked at"]
    if seen.entropy_nats is not None:
        reference = seen.reference_entropy_nats
        known = "no reference" if reference is None else f"original {reference:.2f}"
        parts.append(f"entropy {seen.entropy_nats:.2f} nats ({known})")
    shares = [layer.zeroed_share for layer in seen.layers if layer.zeroed_share is not None]
    if shares:
        parts.append(f"at most {max(shares):.1%} of a layer's activations rounded to 0")
    broken = sum(layer.non_finite + layer.kv_non_finite for layer in seen.layers)
    parts.append(f"{seen.non_finite_logits + broken} NaN or infinite")
    return ", ".join(parts)


def _kl(nats: float | None) -> str:
    return "" if nats is None else f", KL {nats:.4g} nats"


@click.command("lm-eval", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run tasks of lm-evaluation-harness against a server.

    ARGUMENTS are those of `lm_eval run`; its model is `venturi`.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import_module("venturi.lm_eval")  # registers the model
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"{error.name} is not installed: pip install 'venturi-client[lm-eval]'"
        ) from error
    sys.argv = ["venturi lm-eval", "run", "--model", "venturi", *arguments]
    try:
        cli_evaluate()
    except APIConnectionError as error:
        raise Unreachable(f"{error.message}: name the server with --model_args target=") from error
    except VenturiError as error:
        raise click.ClickException(error.message) from error
