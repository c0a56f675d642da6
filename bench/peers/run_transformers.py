"""transformers' generate with fp32 weights."""

import statistics
import time
from typing import Any

import torch
import transformers
from common import CHECK_NEW, PREFILL_TOKENS, Answer, Settings, settings


def generate(model: Any, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    """Seconds, and each sequence's new tokens."""
    ids_BT = torch.tensor(prompts)
    begin = time.perf_counter()
    out_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return time.perf_counter() - begin, out_BT[:, ids_BT.shape[1] :].tolist()


def decode(model: Any, s: Settings, batch: int) -> float:
    """Tokens/s after the first token, which a run of its own measures."""
    first, _ = generate(model, s.prompts(batch, s.prompt, "first"), 1)
    whole, _ = generate(model, s.prompts(batch, s.prompt, "whole"), s.new)
    return batch * (s.new - 1) / (whole - first)


def main() -> None:
    s = settings(__doc__)
    torch.set_num_threads(s.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32)
    _, tokens = generate(model, s.check_prompts(), CHECK_NEW)
    times = [generate(model, p, 1)[0] for p in ([x] for x in s.prompts(3, PREFILL_TOKENS, "p"))]
    Answer(
        engine="transformers",
        version=f"{transformers.__version__}, torch {torch.__version__}",
        prefill_tps=PREFILL_TOKENS / statistics.median(times),
        decode_tps={str(batch): decode(model, s, batch) for batch in s.batches},
        tokens=tokens,
        detail={"dtype": "float32", "threads": torch.get_num_threads()},
    ).print()


if __name__ == "__main__":
    main()
