"""lm_eval's own ``hf`` model and Venturi's, on the same local tasks, item by item.

Runs in an environment with lm_eval, torch and venturi-client. The server must serve the folder's
weights as they are (``--recipe none --kv-dtype fp32``).
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

import venturi.lm_eval  # noqa: F401  registers the model

NAMES = ["Ann", "Ben", "Carla", "Dan", "Eve", "Finn", "Gina", "Hugo"]
THINGS = ["apples", "tickets", "rooms", "books", "stamps", "seats"]
COMMON = {"dataset_path": "json", "test_split": "test"}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "num_fewshot": 2,
        "fewshot_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "pairs": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": 32},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def documents() -> list[dict[str, Any]]:
    """Sums in words; each has what all four tasks ask for."""
    found = []
    for i in range(48):
        name, thing, a, b = NAMES[i % 8], THINGS[i % 6], 3 + i, 2 + i * 7 % 11
        question = f"{name} has {a} {thing} and buys {b} more. How many {thing} are there now?"
        wrong = [a + b + 1, a * b, abs(a - b)]
        choices = [f" {value}" for value in wrong]
        choices.insert(i % 4, f" {a + b}")
        good, bad = f"{name} sees many {thing}.", f"{name} see many {thing}."
        text = f"{question} {a + b}. {good} " * (1 + i % 5 * 8)
        rest = {"label": i % 4, "answer": str(a + b), "good": good, "bad": bad, "text": text}
        found.append({"question": question, "choices": choices, **rest})
    return found


def evaluate(model: str, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What ``simple_evaluate`` answers for all tasks."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=manager,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )


def figures(response: float | tuple[float, bool]) -> tuple[float, *tuple[bool, ...]]:
    """Log-likelihood, and whether greedy choice gives it where that is said."""
    return response if isinstance(response, tuple) else (response,)


def compare(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of a log-likelihood, and whatever else differs, by task."""
    report = {}
    for name, samples in wanted["samples"].items():
        others = {each["doc_id"]: each for each in found["samples"][name]}
        worst, other = 0.0, 0
        for sample in samples:
            pairs = zip(sample["resps"], others[sample["doc_id"]]["resps"], strict=True)
            for (one,), (two,) in pairs:
                if isinstance(one, str):
                    other += one != two
                    continue
                (before, *greedy), (after, *greedy_after) = map(figures, (one, two))
                # NaN would be no larger than anything.
                worst = max(worst, abs(before - after) if math.isfinite(after) else math.inf)
                other += greedy != greedy_after
        metrics = [
            {key: value for key, value in each["results"][name].items() if key != "alias"}
            for each in (wanted, found)
        ]
        report[name] = {"items": len(samples), "nats": worst, "differ": other, "metrics": metrics}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--target", required=True, help="the server, as host:port")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        lines = "\n".join(json.dumps(each) for each in documents())
        (folder / "documents.jsonl").write_text(lines, encoding="utf-8")
        data = {"data_files": {"test": str(folder / "documents.jsonl")}}
        for task, settings in TASKS.items():
            whole = {**COMMON, "task": f"local_{task}", "dataset_kwargs": data, **settings}
            # JSON is YAML.
            (folder / f"{task}.yaml").write_text(json.dumps(whole), encoding="utf-8")
        found = evaluate("venturi", {"target": given.target}, folder)
        longest = json.loads((given.model / "config.json").read_text())["max_position_embeddings"]
        arguments = {"pretrained": str(given.model), "dtype": "float32", "max_length": longest - 2}
        report = compare(evaluate("hf", arguments, folder), found)
    print(json.dumps(report, indent=2))
    equal = all(r["nats"] < 1e-3 and not r["differ"] for r in report.values())
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
