"""Quality of compression methods: held-out loss of a model whose weights were compressed.

    python -m bench.quality [--model DIR] [--calibration TEXT...] [--data TEXT...] [--quick]

All methods round to the same grid (groups of 32, symmetric), keep head and embedding, are
calibrated on the same text layer by layer, and are run with float32 activations. A method's
figure is the increase of the loss over the original in nats per token; intervals are paired
95 % bootstraps over documents.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.block import BlockResult, LinearSteps, compress_block
from compress.calibration import read_samples
from compress.documents import read_windows
from compress.methods.awq import Awq
from compress.methods.gptq import Gptq
from compress.methods.magnitude import Magnitude
from compress.methods.masks import Sparsity
from compress.methods.rtn import Rtn
from compress.methods.scheme import Scheme
from compress.methods.sparsegpt import Joint, SparseGpt
from compress.methods.wanda import Wanda
from compress.sequential import Sequential
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint

EMBEDDED = Path(__file__).parents[1] / "server" / "assets" / "venturi-mini"
# Text beside the repository, where a developer has it.
TEXTS = Path(__file__).parents[2] / "shared" / "data"
TOPICS = ("dialogue", "math", "shell", "storybook", "trivia")
GROUP, RESAMPLES, BATCH = 32, 4000, 16


def scheme(bits: int, scale: str = "absmax") -> Scheme:
    group_size = None if bits == 8 else GROUP
    return Scheme(bits=bits, group_size=group_size, scale=scale)  # type: ignore[arg-type]


def quantisers(bits: int, scale: str) -> dict[str, LinearSteps]:
    grid = scheme(bits, scale)
    awq = Awq(grid, clip=False)
    suffix = "+mse" if scale == "mse" else ""
    return {
        f"int{bits} rtn{suffix}": LinearSteps(quantiser=Rtn(grid)),
        f"int{bits} gptq{suffix}": LinearSteps(quantiser=Gptq(grid)),
        f"int{bits} awq{suffix}": LinearSteps(scalings=(awq,), quantiser=awq),
    }


def methods() -> dict[str, LinearSteps]:
    half, pairs, grid = Sparsity(), Sparsity(structure="2:4"), scheme(4)
    clipped = {bits: Awq(scheme(bits)) for bits in (4, 3)}
    float8 = Scheme(kind="float8")
    found = {
        "int8 rtn": LinearSteps(quantiser=Rtn(scheme(8))),
        "fp8 rtn": LinearSteps(quantiser=Rtn(float8)),
        "fp8 gptq": LinearSteps(quantiser=Gptq(float8)),
    }
    for bits in (4, 3):
        found |= quantisers(bits, "absmax") | quantisers(bits, "mse")
        name, one = f"int{bits} awq+clip", clipped[bits]
        found[name] = LinearSteps(scalings=(one,), quantiser=one)
    for name, sparsity in (("50 %", half), ("2:4", pairs)):
        found[f"{name} magnitude"] = LinearSteps(pruner=Magnitude(sparsity))
        found[f"{name} wanda"] = LinearSteps(pruner=Wanda(sparsity))
        found[f"{name} sparsegpt"] = LinearSteps(pruner=SparseGpt(sparsity))
        pruned = SparseGpt(sparsity)
        found[f"{name} sparsegpt, then int4 rtn"] = LinearSteps(pruner=pruned, quantiser=Rtn(grid))
        joint = Joint(sparsity, grid)
        found[f"{name} sparsegpt + int4 gptq"] = LinearSteps(pruner=pruned, quantiser=joint)
    return found


QUICK = {
    "int8 rtn": "int8", "int4 rtn": "int4_rtn", "int4 gptq": "int4_gptq",
    "int4 awq+clip": "int4_awq",
    "50 % magnitude": "sparse50_magnitude", "50 % wanda": "sparse50_wanda",
    "50 % sparsegpt": "sparse50_sparsegpt",
}  # fmt: skip
# (better, worse, what is claimed): "below" needs an interval below 0, "not above" one that
# reaches 0 or less.
CLAIMS = [
    ("fp8 gptq", "fp8 rtn", "not above"),
    ("int4 gptq", "int4 rtn", "below"),
    ("int3 gptq", "int3 rtn", "below"),
    ("int4 gptq+mse", "int4 rtn+mse", "below"),
    ("int3 gptq+mse", "int3 rtn+mse", "below"),
    ("int3 awq", "int3 rtn", "below"),
    ("int4 awq", "int4 rtn", "not above"),
    ("int3 awq+clip", "int3 rtn+mse", "below"),
    ("int4 awq+clip", "int4 rtn+mse", "not above"),
    ("int3 awq+mse", "int3 rtn+mse", "below"),
    ("int4 awq+mse", "int4 rtn+mse", "not above"),
    *[(f"{s} {m}", f"{s} magnitude", "below") for s in ("50 %", "2:4")
      for m in ("wanda", "sparsegpt")],
    ("50 % sparsegpt", "50 % wanda", "not above"),
    ("2:4 sparsegpt", "2:4 wanda", "not above"),
    *[(f"{s} sparsegpt + int4 gptq", f"{s} sparsegpt, then int4 rtn", "not above")
      for s in ("50 %", "2:4")],
]  # fmt: skip


@dataclass(slots=True)
class Scores:
    """Sums over each document: negative log-likelihood and KL(original || this), in nats."""

    nll_D: NDArray[np.float64]
    kl_D: NDArray[np.float64]
    seconds: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    mask_kept: bool | None = None


class Held:
    """Held-out documents by length, padded on the right, which a causal model does not see."""

    def __init__(self, windows: list[list[int]]) -> None:
        windows = sorted(windows, key=len)
        self._batches = [_padded(windows[i : i + BATCH]) for i in range(0, len(windows), BATCH)]
        self.tokens_D = np.array([len(one) - 1 for one in windows], np.float64)

    @torch.inference_mode()
    def score(
        self, blocks: Blocks, changed: dict[int, dict[str, Tensor]], originals: list[Tensor] | None
    ) -> tuple[Scores, list[Tensor]]:
        """Scores the model with the layers' tensors ``changed``; log-probabilities by batch.

        ``originals`` None scores the original itself.
        """
        parts = [blocks.embed(ids_BL) for ids_BL, _ in self._batches]
        for index in range(len(blocks.spec.layers)):
            layer = blocks.layer(index, changed.get(index, {}))
            parts = [blocks.run(layer, index, part) for part in parts]
        nll, kl, kept = [], [], []
        for part, ((ids_BL, real_BL), hidden_BLK) in enumerate(
            zip(self._batches, parts, strict=True)
        ):
            log_q = blocks.logits(hidden_BLK)[:, :-1].log_softmax(-1)
            nll.append(
                (-log_q.gather(2, ids_BL[:, 1:, None])[..., 0] * real_BL).sum(
                    1, dtype=torch.float64
                )
            )
            if originals is None:
                kept.append(log_q)
                kl.append(torch.zeros(len(ids_BL), dtype=torch.float64))
            else:
                log_p = originals[part]
                kl.append(
                    ((log_p.exp() * (log_p - log_q)).sum(-1) * real_BL).sum(1, dtype=torch.float64)
                )
        return Scores(torch.cat(nll).numpy(), torch.cat(kl).numpy()), kept


def _padded(windows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids [B, L], and where a next token is predicted."""
    length = max(map(len, windows))
    ids_BL = torch.tensor([one + [0] * (length - len(one)) for one in windows])
    lengths_B = torch.tensor([len(one) for one in windows])
    return ids_BL, torch.arange(1, length) < lengths_B[:, None]


def held_out(
    model: Path, files: Sequence[Path], documents: int, length: int, skip: int = 0
) -> Held:
    """Documents of each file after its first ``skip``, as many of each, ``documents`` in all."""
    per_file = -(-documents // len(files))
    return Held(
        [
            window
            for file in files
            for window in read_windows(model, file, window=length)[skip : skip + per_file]
        ]
    )


def compress_model(
    blocks: Blocks, ids_SL: Tensor, steps: LinearSteps
) -> tuple[dict[int, dict[str, Tensor]], dict[str, int], bool | None]:
    """All layers' new tensors, how often each method was kept, and whether masks held."""
    state = Sequential(blocks, ids_SL, Path(tempfile.gettempdir()))
    changed: dict[int, dict[str, Tensor]] = {}
    kept: dict[str, int] = {}
    masks: list[bool] = []
    for index, (layer, names) in enumerate(zip(blocks.spec.layers, blocks.spec.names, strict=True)):
        modules = [module for matrix in names.matrices() for module in matrix.modules]
        captured = state.capture(index, set(modules))
        with torch.inference_mode():
            result = compress_block(
                layer, names, dict.fromkeys(modules, steps), blocks.checkpoint.tensor, captured
            )
        changed[index] = floating(result)
        for one in result.linears.values():
            for outcome in one.outcomes:
                kept[outcome.method] = kept.get(outcome.method, 0) + 1
        if isinstance(steps.quantiser, Joint):
            masks += [
                mask_holds(changed[index][f"{m}.weight"], steps.quantiser.sparsity) for m in modules
            ]
        state.advance(index, changed[index])
    return changed, kept, all(masks) if masks else None


def floating(result: BlockResult) -> dict[str, Tensor]:
    """A compressed layer's tensors by their names in the original checkpoint."""
    weights = {f"{name}.weight": one.weight for name, one in result.linears.items()}
    return dict(result.vectors) | {
        name: weight if isinstance(weight, Tensor) else weight.dequantize()
        for name, weight in weights.items()
    }


def mask_holds(weight_NK: Tensor, sparsity: Sparsity) -> bool:
    zeros = weight_NK == 0
    if sparsity.pattern is None:
        return bool(zeros.float().mean() >= sparsity.share - 1e-4)
    n, m = sparsity.pattern
    return bool((zeros.unflatten(1, (-1, m)).sum(2) >= m - n).all())


def interval(
    difference_D: NDArray[np.float64], tokens_D: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Mean per token with its 95 % bootstrap interval over documents."""
    draws = np.random.default_rng(0).integers(len(tokens_D), size=(RESAMPLES, len(tokens_D)))
    means = difference_D[draws].sum(1) / tokens_D[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference_D.sum() / tokens_D.sum()), float(low), float(high)


def run(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Held, dict[str, Scores]]:
    blocks = Blocks.open(Checkpoint.open(arguments.model))
    documents = 80 if arguments.quick else arguments.documents
    samples = 48 if arguments.quick else arguments.samples
    held = held_out(arguments.model, arguments.data, documents, arguments.length, arguments.skip)
    ids_SL = read_samples(
        arguments.model, arguments.calibration, samples=samples, length=arguments.length, seed=0
    )
    original, log_p = held.score(blocks, {}, None)
    found = {"original": original}
    for name, steps in methods().items():
        if arguments.quick and name not in QUICK:
            continue
        if arguments.only and name not in arguments.only:
            continue
        start = time.perf_counter()
        changed, kept, masks = compress_model(blocks, ids_SL, steps)
        seconds = time.perf_counter() - start
        scores, _ = held.score(blocks, changed, log_p)
        scores.seconds, scores.kept, scores.mask_kept = seconds, kept, masks
        found[name] = scores
        say(row(name, scores, original, held))
    return held, found


def row(name: str, scores: Scores, original: Scores, held: Held) -> str:
    loss = interval(scores.nll_D - original.nll_D, held.tokens_D)
    kl = scores.kl_D.sum() / held.tokens_D.sum()
    kept = ", ".join(f"{method} {count}" for method, count in scores.kept.items())
    mask = "" if scores.mask_kept is None else f"; mask {'kept' if scores.mask_kept else 'BROKEN'}"
    loss_text = f"{loss[0]:.4f} | {loss[1]:.4f} to {loss[2]:.4f}"
    return f"| {name} | {loss_text} | {kl:.4f} | {kept}{mask} | {scores.seconds:.1f} |"


def claims(held: Held, found: dict[str, Scores]) -> Iterator[str]:
    for better, worse, claim in CLAIMS:
        if better in found and worse in found:
            value, low, high = interval(found[better].nll_D - found[worse].nll_D, held.tokens_D)
            holds = high < 0 if claim == "below" else low <= 0
            text = f"{value:.4f} | {low:.4f} to {high:.4f} | {'yes' if holds else 'NO'}"
            yield f"| {better} {claim} {worse} | {text} |"


def perplexity(scores: Scores, held: Held) -> float:
    return math.exp(scores.nll_D.sum() / held.tokens_D.sum())


def figures(held: Held, found: dict[str, Scores]) -> dict[str, float]:
    values: dict[str, float] = {
        "fp32_ppl": perplexity(found["original"], held),
        "eval_tokens": int(held.tokens_D.sum()),
    }
    for name, key in QUICK.items():
        if name in found:
            values[f"{key}_ppl"] = perplexity(found[name], held)
    if "int8 rtn" in found:
        values["int8_ppl_ratio"] = values["int8_ppl"] / values["fp32_ppl"]
        values["int8_kl"] = float(found["int8 rtn"].kl_D.sum() / held.tokens_D.sum())
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    calibration = [TEXTS / "train" / f"{topic}.txt" for topic in TOPICS]
    held_out = [TEXTS / f"{topic}-val.txt" for topic in TOPICS]
    parser.add_argument("--calibration", type=Path, nargs="+", default=calibration, metavar="TEXT")
    parser.add_argument("--data", type=Path, nargs="+", default=held_out, help="held-out text")
    parser.add_argument("--documents", type=int, default=160)
    parser.add_argument("--skip", type=int, default=0, help="first documents of each file to leave")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256, help="tokens of a document or sample")
    parser.add_argument("--quick", action="store_true", help="few methods, little text")
    parser.add_argument(
        "--only", nargs="+", choices=methods(), metavar="METHOD", help="methods, for trials"
    )
    parser.add_argument("--threads", type=int, default=1, help="1 is best for small models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if missing := [str(p) for p in (*arguments.calibration, *arguments.data) if not p.is_file()]:
        parser.error(f"there is no {missing[0]}: name text with --calibration and --data")
    torch.set_num_threads(arguments.threads)
    print("| method | nats above the original | 95 % | KL | kept | s |\n|---|---|---|---|---|---|")
    held, found = run(arguments, print)
    values = figures(held, found)
    documents = f"{values['eval_tokens']} tokens of {len(held.tokens_D)} documents"
    print(f"\n{documents}; original perplexity {values['fp32_ppl']:.3f}\n")
    print("| claim | difference | 95 % | holds |\n|---|---|---|---|")
    for line in claims(held, found):
        print(line)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
