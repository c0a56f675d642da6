"""llm-compressor: one model compressed by one method after the other, each into its own folder.

python run_llmcompressor.py --model DIR --ids FILE --settings FILE --out DIR

``--ids`` holds a JSON list of samples, each a list of token ids, all of one length; ``--settings``
a JSON list of objects with ``name``, ``method``, ``bits``, ``group_size``, ``scale``, ``sparsity``
and ``structure``. For each, compressed-tensors weights go to DIR/NAME, the same weights in float32
to DIR/NAME.safetensors, and one line of JSON with ``name``, ``version``, ``seconds`` and
``cpu_seconds`` is printed. The seconds are those of ``oneshot`` on a loaded model: calibration and
compression, neither loading nor saving.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import llmcompressor
import torch
from compressed_tensors.quantization import forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

DAMPING = 0.01
# Every candidate of both kinds of scale.
AWQ = {"duo_scaling": "both", "n_grid": 40}
# Clippings from 1 in steps of 0.02 down to 0.5, squared errors, no early end.
MSE = {"norm": 2.0, "maxshrink": 0.52, "grid": 50.0, "patience": 1000}


def grid(setting: dict[str, Any]) -> dict[str, Any]:
    """The quantisation of weights, as compressed-tensors describes it."""
    mse = setting["scale"] == "mse"
    weights = {
        "num_bits": setting["bits"],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": setting["group_size"],
        "observer": "memoryless_mse" if mse else "memoryless_minmax",
        "observer_kwargs": MSE if mse else {},
    }
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def recipe(setting: dict[str, Any]) -> list[Any]:
    """The modifiers, in order; the head stays as it is."""
    ignore = ["lm_head"]
    method = setting["method"]
    if method == "sparsegpt":
        structure = setting["structure"]
        return [
            SparseGPTModifier(
                sparsity=setting["sparsity"],
                mask_structure="0:0" if structure == "unstructured" else structure,
                dampening_frac=DAMPING,
                ignore=["re:.*lm_head"],
            )
        ]
    if method == "gptq":
        rounding = grid(setting)
        return [GPTQModifier(dampening_frac=DAMPING, actorder="static", ignore=ignore, **rounding)]
    rounding = QuantizationModifier(ignore=ignore, **grid(setting))
    return [AWQModifier(**AWQ), rounding] if method == "awq" else [rounding]


def compress(
    model: Path, ids: list[list[int]], setting: dict[str, Any], batch: int
) -> tuple[Any, float, float]:
    """The compressed model, the seconds that it took, and the seconds of CPU."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = [
        {"input_ids": torch.tensor(one), "attention_mask": torch.ones(len(one), dtype=torch.long)}
        for one in ids
    ]
    begin, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=loaded,
        dataset=DataLoader(samples, batch_size=batch),
        recipe=recipe(setting),
        num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
        pipeline="sequential",
    )
    return loaded, time.perf_counter() - begin, time.process_time() - cpu


@torch.no_grad()
def dense(model: Any) -> dict[str, Tensor]:
    """All weights, those of quantised modules as they are after rounding."""
    tensors = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            tensors[name] = parameter.detach().clone()
        elif name.endswith(".weight"):
            tensors[name] = forward_quantize(module, parameter, "weight", scheme.weights)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    torch.set_num_threads(given.threads)
    # AWQ pins memory for copies to an accelerator, which raises where there is none.
    IntermediatesCache.pin_memory = lambda *_: None
    ids = json.loads(given.ids.read_text(encoding="utf-8"))
    settings = json.loads(given.settings.read_text(encoding="utf-8"))
    compress(given.model, ids[: given.batch], settings[0], given.batch)  # warms up
    for setting in settings:
        model, seconds, cpu_seconds = compress(given.model, ids, setting, given.batch)
        folder = given.out / setting["name"]
        folder.mkdir(parents=True)
        save_file(dense(model), folder.with_suffix(".safetensors"))
        model.save_pretrained(folder)
        line = {
            "name": setting["name"],
            "version": llmcompressor.__version__,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
