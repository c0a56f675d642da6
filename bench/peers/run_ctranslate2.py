"""CTranslate2's Generator with int8 weights."""

import statistics
import time
from pathlib import Path

import ctranslate2
from common import CHECK_NEW, PREFILL_TOKENS, Answer, Settings, settings
from ctranslate2.converters import TransformersConverter


def converted(s: Settings) -> Path:
    """The folder of int8 weights, written on the first run."""
    folder = s.work / "ctranslate2-int8"
    if not (folder / "model.bin").is_file():
        TransformersConverter(str(s.model)).convert(str(folder), quantization="int8", force=True)
    return folder


def generate(
    generator: ctranslate2.Generator, prompts: list[list[int]], new: int
) -> tuple[float, list[list[int]]]:
    """Seconds, and each sequence's new tokens. Its tokens are text: ``t17`` is id 17."""
    texts = [[f"t{token}" for token in prompt] for prompt in prompts]
    begin = time.perf_counter()
    results = generator.generate_batch(
        texts,
        max_length=new,
        min_length=new,
        end_token=[],
        include_prompt_in_result=False,
        max_batch_size=0,
    )
    return time.perf_counter() - begin, [result.sequences_ids[0] for result in results]


def decode(generator: ctranslate2.Generator, s: Settings, batch: int) -> float:
    """Tokens/s after the first token, which a run of its own measures."""
    first, _ = generate(generator, s.prompts(batch, s.prompt, "first"), 1)
    whole, _ = generate(generator, s.prompts(batch, s.prompt, "whole"), s.new)
    return batch * (s.new - 1) / (whole - first)


def main() -> None:
    s = settings(__doc__)
    generator = ctranslate2.Generator(
        str(converted(s)),
        device="cpu",
        compute_type="int8",
        inter_threads=1,
        intra_threads=s.threads,
    )
    _, tokens = generate(generator, s.check_prompts(), CHECK_NEW)
    prompts = s.prompts(3, PREFILL_TOKENS, "prefill")
    times = [generate(generator, [prompt], 1)[0] for prompt in prompts]
    Answer(
        engine="CTranslate2",
        version=ctranslate2.__version__,
        prefill_tps=PREFILL_TOKENS / statistics.median(times),
        decode_tps={str(batch): decode(generator, s, batch) for batch in s.batches},
        tokens=tokens,
        detail={"compute_type": generator.compute_type, "threads": s.threads},
    ).print()


if __name__ == "__main__":
    main()
