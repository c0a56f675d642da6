"""`venturi serve`: flags -> configuration -> service."""

import logging
import sys
from pathlib import Path
from typing import Any

import click
import uvloop

from server.app import StartFailed
from server.app import serve as run_service
from server.config import ConfigError, load_config
from server.console import say


def main() -> None:
    """The process's entry: every error is one line with its remedy, and exit code 2."""
    try:
        code = serve.main(prog_name="venturi serve", standalone_mode=False)
    except click.ClickException as error:
        say(f"{error.format_message()} (see: venturi serve --help)")
        code = 2
    except (ConfigError, StartFailed) as error:
        say(str(error))
        code = 2
    except click.Abort:
        code = 130
    sys.exit(code)


@click.command(
    "serve", context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]}
)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--recipe", metavar="PRESET|FILE", help="w8a8 (default), a YAML file, or none.")
@click.option(
    "--scale",
    is_flag=True,
    default=None,
    help="In place of a recipe: w8a16, then w8a8, w4a8, sparse50-w4a8, as far as the gate passes.",
)
@click.option(
    "--allow-slow",
    is_flag=True,
    default=None,
    help="Serve what has no fast kernel here (fp8).",
)
@click.option(
    "--gate",
    type=click.Choice(["off", "warn", "enforce"]),
    help="What a model that lost too much is: served, served with a warning, or refused.",
)
@click.option(
    "--original",
    type=click.Path(path_type=Path),
    help="What a MODEL that is compressed already was made of.",
)
@click.option(
    "--fallback",
    type=click.Choice(["off", "non-finite", "alarm"]),
    help="Serve the original after NaN or infinite numbers, or after any alarm. Default off.",
)
@click.option(
    "--monitor-steps", type=int, metavar="N", help="Look into one step in N. Default 64; 0: off."
)
@click.option(
    "--alarm-entropy",
    metavar="NATS",
    type=float,
    help="Shift of entropy to warn at. Default 3.",
)
@click.option(
    "--alarm-non-finite",
    type=int,
    metavar="N",
    help="NaN or infinities to warn at. Default 1.",
)
@click.option("--name", help="Name to serve the model under; default: the folder's name.")
@click.option("--host", help="Default 127.0.0.1.")
@click.option("--port", type=int, help="Default 50051; 0 takes a free one.")
@click.option("--kv-dtype", type=click.Choice(["auto", "int8", "fp32"]), help="KV cache.")
@click.option("--kv-memory", metavar="SIZE", help="Memory of the KV cache; default 256MiB.")
@click.option("--kv-blocks", type=int, help="Blocks of the KV cache, in place of --kv-memory.")
@click.option("--max-requests", type=int, help="Open requests; more are refused. Default 256.")
@click.option(
    "--max-queued-tokens",
    type=int,
    help="Prompt tokens that wait for a first token; more are refused. Default 16384.",
)
@click.option("--max-sequences", type=int, help="Sequences in a step. Default 64.")
@click.option("--token-budget", type=int, help="Tokens in a step. Default 512.")
@click.option("--speculative-tokens", type=int, help="Drafts a step. Default 4; 0: off.")
@click.option("--threads", type=int, help="Threads of the engine; default: by size.")
@click.option("--cache-dir", type=click.Path(), help="Where artefacts are kept.")
@click.option("--reflection/--no-reflection", default=None, help="gRPC reflection.")
@click.option(
    "--engine-timeout",
    type=float,
    help="Seconds without a word of the engine after which health says NOT_SERVING. Default 60.",
)
@click.option("--drain-timeout", type=float, help="Seconds that a stop waits. Default 30.")
@click.option("--request-timeout", type=float, help="Seconds that a request may take. Default 600.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option(
    "--config",
    "file",
    envvar="VENTURI_CONFIG",
    type=click.Path(path_type=Path),
    help="YAML file of these.",
)
def serve(file: Path | None, **flags: Any) -> int:
    """Compress MODEL (a Hugging Face folder; the embedded one by default) and serve it.

    Each option is also an environment variable: --kv-dtype is VENTURI_KV_DTYPE.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    config = load_config(given, file)
    logging.basicConfig(
        level=config.log_level.upper(), format="venturi: %(levelname)s %(name)s: %(message)s"
    )
    return uvloop.run(run_service(config))
