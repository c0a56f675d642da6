"""OpenVINO GenAI's continuous batching with int8 or int4 weights, exported by optimum-intel."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from common import CHECK_NEW, PREFILL_TOKENS, Answer, DecodeClock, Settings, settings

_INT4 = ["--group-size", "128", "--group-size-fallback", "adjust"]
# More than the largest batch needs.
_CACHE_GB = 4


def exported(s: Settings) -> Path:
    """The folder of compressed weights, written on the first run."""
    folder = s.work / f"openvino-int{s.bits}"
    if not (folder / "openvino_model.bin").is_file():
        program = Path(sys.executable).with_name("optimum-cli")
        command = [program, "export", "openvino", "--model", s.model]
        command += ["--task", "text-generation-with-past", "--weight-format", f"int{s.bits}"]
        command += _INT4 if s.bits == 4 else []
        subprocess.run([*command, folder], check=True, capture_output=True)
    return folder


def pipeline(s: Settings) -> genai.ContinuousBatchingPipeline:
    """With a step as large as the prompt, and no prefix cache."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = _CACHE_GB
    scheduler.max_num_batched_tokens = PREFILL_TOKENS
    scheduler.max_num_seqs = max(*s.batches, 16)
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": s.threads, "PERFORMANCE_HINT": "LATENCY"}
    return genai.ContinuousBatchingPipeline(exported(s), scheduler, "CPU", properties)


def generate(
    pipe: genai.ContinuousBatchingPipeline, prompts: list[list[int]], new: int
) -> tuple[DecodeClock, list[list[int]]]:
    """The clock of their decoding, and each sequence's new tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new
    config.ignore_eos = True
    config.do_sample = False
    clock = DecodeClock(len(prompts), new)
    handles = [
        pipe.add_request(index, openvino.Tensor(np.array([prompt], dtype=np.int64)), config)
        for index, prompt in enumerate(prompts)
    ]
    tokens: list[list[int]] = [[] for _ in prompts]
    while pipe.has_non_finished_requests():
        pipe.step()
        counts = {}
        for index, handle in enumerate(handles):
            if handle.can_read():
                (output,) = handle.read().values()
                tokens[index] += output.generated_ids
                counts[index] = len(output.generated_ids)
        clock.add(counts)
    return clock, tokens


def prefill_s(pipe: genai.ContinuousBatchingPipeline, prompt: list[int]) -> float:
    """Seconds to one prompt's first token."""
    begin = time.perf_counter()
    generate(pipe, [prompt], 1)
    return time.perf_counter() - begin


def main() -> None:
    s = settings(__doc__)
    pipe = pipeline(s)
    _, tokens = generate(pipe, s.check_prompts(), CHECK_NEW)
    times = [prefill_s(pipe, prompt) for prompt in s.prompts(4, PREFILL_TOKENS, "prefill")][1:]
    decode = {}
    for batch in s.batches:
        clock, _ = generate(pipe, s.prompts(batch, s.prompt, "decode"), s.new)
        decode[str(batch)] = clock.tokens_per_second
    Answer(
        engine="OpenVINO GenAI",
        version=genai.__version__,
        prefill_tps=PREFILL_TOKENS / statistics.median(times),
        decode_tps=decode,
        tokens=tokens,
        detail={"weights": f"int{s.bits}", "threads": s.threads},
    ).print()


if __name__ == "__main__":
    main()
