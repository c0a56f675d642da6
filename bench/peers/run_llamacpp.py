"""llama.cpp: llama-bench and llama-batched-bench, built natively, with Q8_0 or Q4_0 weights.

The environment holds them in ``llama/bin`` and the sources' Python package in ``source``.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from common import CHECK_NEW, PREFILL_TOKENS, Answer, Settings, settings
from gguf_model import write_gguf

ENVIRONMENT = Path(sys.prefix)
PROGRAMS = ENVIRONMENT / "llama" / "bin"
TYPES = {8: "Q8_0", 4: "Q4_0"}


def converted(s: Settings) -> Path:
    """The file of quantised weights, written on the first run."""
    file = s.work / f"llamacpp-{TYPES[s.bits]}.gguf"
    if not file.is_file():
        s.work.mkdir(parents=True, exist_ok=True)
        original, part = s.work / "llamacpp-F16.gguf", s.work / "llamacpp.part"
        write_gguf(s.model, original)
        command = [PROGRAMS / "llama-quantize", original, part, TYPES[s.bits], str(s.threads)]
        subprocess.run(command, check=True, capture_output=True)
        original.unlink()
        part.rename(file)
    return file


def run(program: str, *arguments: str) -> list[dict[str, object]]:
    """The lines of JSON that it prints."""
    command = [PROGRAMS / program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def prefill(file: Path, s: Settings) -> float:
    """Tokens/s of one prompt: llama-bench's mean of three after a warm-up."""
    (line,) = run(
        "llama-bench",
        *("-m", str(file), "-p", str(PREFILL_TOKENS), "-n", "0", "-r", "3"),
        *("-t", str(s.threads), "-o", "jsonl"),
    )
    return float(str(line["avg_ts"]))


def decode(file: Path, s: Settings) -> dict[str, float]:
    """Tokens/s after prompts. The sequences have their own copies of one prompt's cache."""
    context = max(s.batches) * (s.prompt + s.new)
    lines = run(
        "llama-batched-bench",
        *("-m", str(file), "-c", str(context), "-pps", "-npp", str(s.prompt)),
        *("-ntg", str(s.new), "-npl", ",".join(map(str, s.batches))),
        *("-t", str(s.threads), "--output-format", "jsonl"),
    )
    return {str(line["pl"]): float(str(line["speed_tg"])) for line in lines}


def greedy(file: Path, prompts: list[list[int]], new: int, threads: int) -> list[list[int]]:
    """The tokens after each prompt, through the sources' own Python bindings."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(PROGRAMS)
    sys.path.insert(0, str(ENVIRONMENT / "source"))
    import llama_cpp

    model = llama_cpp.Llama(
        str(file), n_ctx=len(prompts[0]) + new, n_threads=threads, logits_all=False, verbose=False
    )
    answers = []
    for prompt in prompts:
        tokens = model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        answers.append([int(token) for _, token in zip(range(new), tokens, strict=False)])
    return answers


def version() -> str:
    """Of the package whose vendored sources were built."""
    text = (ENVIRONMENT / "source" / "llama_cpp" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.*)"', text)
    assert found is not None
    return f"vendored in llama-cpp-python {found[1]}"


def main() -> None:
    s = settings(__doc__)
    file = converted(s)
    Answer(
        engine="llama.cpp",
        version=version(),
        prefill_tps=prefill(file, s),
        decode_tps=decode(file, s),
        tokens=greedy(file, s.check_prompts(), CHECK_NEW, s.threads),
        detail={"type": TYPES[s.bits], "KV cache": "F16", "threads": s.threads},
    ).print()


if __name__ == "__main__":
    main()
