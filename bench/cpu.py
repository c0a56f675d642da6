"""Venturi against its peers on a CPU: prefill and decode, gRPC, memory, the machine's ceilings.

python -m bench.cpu [--quick] [--json FILE] [--models S M L] [--peers NAME ...] [--repeats N]

All engines take turns on the same random weights, each in a process of its own, in every
repetition; prompts are new each time. ``make bench-peers`` sets the peers up. An engine that fails
is noted, and the others go on. After each model cpu.md and the model's plot are written into
``--out``; ``--report`` writes them again from build/bench/cpu.json. ``--quick`` measures model M
without peers.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from bench import cpu_report
from bench.cpu_engines import OURS, PEERS, Engine, threads
from bench.cpu_models import SHAPES, artefact, matrix_weights, model
from bench.cpu_results import Measured, Results
from bench.peers.common import Settings
from bench.serve import commit
from engine.client.process import environment

# Weights and answers are kept between runs.
FOLDER = Path("build/bench")
RESULTS = Path("bench/results")
BATCHES = (1, 8, 32)


def answer(
    script: list[str], s: Settings, limit: float, env: dict[str, str] | None = None
) -> dict[str, object]:
    """What a script prints.

    Raises ``RuntimeError`` with the end of its output, also where it takes ``limit`` seconds.
    """
    command = [
        *script,
        *("--model", str(s.model), "--work", str(s.work), "--bits", str(s.bits)),
        *("--threads", str(s.threads), "--prompt", str(s.prompt), "--new", str(s.new)),
        *("--seed", str(s.seed), "--batches", *map(str, s.batches)),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=env,
    ) as process:
        try:
            out, errors = process.communicate(timeout=limit)
        except BaseException:
            # With the programs that a script runs.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise RuntimeError(errors.strip()[-800:])
    line: dict[str, object] = json.loads(out.strip().splitlines()[-1])
    return line


def settings(engine: Engine, name: str, seed: int, given: argparse.Namespace) -> Settings:
    folder = given.folder
    return Settings(
        model=artefact(name, engine.recipe, folder) if engine.recipe else model(name, folder),
        work=folder / f"{name}-peers",
        bits=engine.bits,
        threads=given.threads,
        prompt=given.prompt,
        new=given.new,
        batches=[batch for batch in BATCHES if batch <= engine.most],
        seed=seed,
        vocabulary=SHAPES[name].vocabulary,
    )


def repetition(
    results: Results, engines: Iterable[Engine], name: str, seed: int, given: argparse.Namespace
) -> None:
    """Every engine once; an engine that fails is noted, and the others go on."""
    for engine in engines:
        if name not in engine.models:
            continue
        begin = time.monotonic()
        try:
            measured = one(engine, name, seed, given)
        except Exception as error:
            results.fail(name, engine.name, f"{type(error).__name__}: {error}")
            outcome = "FAILED"
        else:
            results.add(name, engine.name, measured)
            outcome = f"decode at 1: {measured.value('decode1_tps'):.1f} tokens/s"
        seconds = f"{time.monotonic() - begin:.0f} s"
        print(
            f"{time.strftime('%H:%M:%S')} {name} {seed + 1}/{given.repeats} {engine.name}: "
            f"{outcome}, {seconds}",
            file=sys.stderr,
            flush=True,
        )


def one(engine: Engine, name: str, seed: int, given: argparse.Namespace) -> Measured:
    """One engine's figures of one repetition."""
    s = settings(engine, name, seed, given)
    script = engine.command(given.peers_folder)
    if not engine.recipe:
        return Measured.from_answer(answer(script, s, given.limit))
    # As the server starts its engine.
    env = environment()
    measured = Measured.from_answer(answer(script, s, given.limit, env))
    measured.add_served(answer([sys.executable, "-m", "bench.cpu_server"], s, given.limit, env))
    return measured


def full(given: argparse.Namespace) -> Results:
    engines = [*OURS, *(peer for peer in PEERS if peer.environment in given.peers)]
    results = Results(
        commit=commit(),
        threads=given.threads,
        prompt=given.prompt,
        new=given.new,
        repeats=given.repeats,
    )
    for name in given.models:
        for seed in range(given.repeats):
            repetition(results, engines, name, seed, given)
            results.write(given.folder / "cpu.json")
        cpu_report.write(results, given.out)
    return results


def quick(given: argparse.Namespace) -> dict[str, object]:
    """The figures of model M and its INT8 recipe, without peers."""
    given.prompt, given.new, given.repeats = 64, 64, 1
    results = Results(
        commit=commit(), threads=given.threads, prompt=given.prompt, new=given.new, repeats=1
    )
    repetition(results, OURS[:1], "M", 0, given)
    if results.failures:
        raise RuntimeError(results.failures["M"][OURS[0].name])
    found = results.of("M", OURS[0].name)
    ceiling = found.value("dram_gb_s") * 1e9 / matrix_weights(SHAPES["M"])
    shares = {b: found.value(f"grpc{b}_share") for b in BATCHES}
    return {
        "commit": results.commit,
        "threads": results.threads,
        "dram_gb_s": found.value("dram_gb_s"),
        "decode1_share_of_dram": found.value("decode1_tps") / ceiling,
        **{f"decode{b}_tps": found.value(f"decode{b}_tps") for b in BATCHES},
        "prefill_tps": found.value("prefill_tps"),
        "grpc_share_of_engine": min(shares.values()),
        **{f"grpc{b}_share_of_engine": share for b, share in shares.items()},
        "grpc32_client_cpu": found.value("grpc32_client_cpu"),
        "pss_mb": found.value("pss_bytes") / 1e6,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    names = sorted({peer.environment for peer in PEERS})
    parser.add_argument("--quick", action="store_true", help="under a minute: M, no peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--peers", nargs="*", default=names, choices=names)
    parser.add_argument("--peers-folder", type=Path, default=Path("build/peers"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps models and results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="gets cpu.md and the plots")
    parser.add_argument("--limit", type=float, default=2400, help="seconds for one engine")
    parser.add_argument("--threads", type=int, default=threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--report", type=Path, metavar="JSON", help="report an earlier run")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    # Beside the engine's threads nothing else of ours may spin.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if given.quick:
        figures = quick(given)
        for name, value in figures.items():
            print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    else:
        results = Results.read(given.report) if given.report else full(given)
        figures = results.figures()
        print(cpu_report.write(results, given.out))
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
