"""What the model ``venturi`` of lm-evaluation-harness answers, against transformers in float32."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from server.config import EMBEDDED_MODEL
from server.testing import ServerProcess
from venturi import Client
from venturi._scoring import Scorer

LONG = "The train to Boston leaves at nine, and the next one at ten. " * 60
ITEMS = [
    ("User: I would like to find a restaurant", " in San Jose."),
    ("The capital of France is ", "Paris"),  # the space belongs to what follows it
    ("", "Once upon a time there was a fox."),
    ("  ", "It rains."),
    ("Ça coûte 3 €; 数", "学: naïve"),
    (LONG, " The end."),
    ("A", LONG[:1200]),
]


class Reference:
    """Plain float32 log-probabilities; ``longest`` tokens are the most that one follows."""

    def __init__(self, folder: Path, longest: int) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.longest = longest

    @torch.no_grad()
    def tokens(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        whole = torch.tensor((context + continuation)[-(self.longest + 1) :])
        log_TV = self.model(whole[None, :-1]).logits[0].log_softmax(-1)
        log_TV, wanted = log_TV[-len(continuation) :], whole[-len(continuation) :]
        own = log_TV.gather(1, wanted[:, None]).sum()
        return float(own), bool((log_TV.argmax(-1) == wanted).all())

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        before = self.tokenizer.encode(context.rstrip())
        whole = self.tokenizer.encode(context + continuation)
        prefix = [] if before else [self.tokenizer.bos_token_id]
        return self.tokens(prefix + before, whole[len(before) :])

    def rolling(self, text: str) -> float:
        ids, total = self.tokenizer.encode(text), 0.0
        for begin in range(0, len(ids), self.longest):
            end = min(begin + self.longest, len(ids))
            all_ids = [self.tokenizer.bos_token_id, *ids]
            total += self.tokens(all_ids[max(0, end - self.longest) : begin + 1], ids[begin:end])[0]
        return total

    @torch.no_grad()
    def generate(self, context: str, count: int) -> str:
        prompt = torch.tensor([self.tokenizer.encode(context)[-(self.longest - count) :]])
        whole = self.model.generate(prompt, do_sample=False, max_new_tokens=count, pad_token_id=0)
        return str(self.tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def scorer(pool: tuple[str, ...]) -> Iterator[Scorer]:
    flags = ("--recipe", "none", "--kv-dtype", "fp32")
    with ServerProcess(*flags, *pool) as process, Client(process.target) as client:
        yield Scorer(client, "", max_length=None, prefix_id=None, timeout_s=60.0)


@pytest.fixture(scope="module")
def reference(scorer: Scorer) -> Reference:
    return Reference(EMBEDDED_MODEL, scorer.max_length)


@pytest.mark.parametrize(("context", "continuation"), ITEMS)
def test_log_likelihoods(
    context: str, continuation: str, scorer: Scorer, reference: Reference
) -> None:
    found, greedy = scorer.loglikelihood(context, continuation)
    wanted, wanted_greedy = reference.loglikelihood(context, continuation)
    assert found == pytest.approx(wanted, abs=1e-3)
    assert greedy == wanted_greedy


def test_what_greedy_decoding_gives_is_greedy(scorer: Scorer, reference: Reference) -> None:
    context = "User: I would like to find a restaurant in San Jose.\nAssistant:"
    answer = reference.generate(context, 12)
    assert scorer.loglikelihood(context, answer)[1]
    assert not scorer.loglikelihood(context, answer + " Zanzibar")[1]


@pytest.mark.parametrize("length", [0, 40, 2100, 9000])
def test_whole_texts(length: int, scorer: Scorer, reference: Reference) -> None:
    text = (LONG * 3)[:length]
    assert scorer.rolling(text) == pytest.approx(reference.rolling(text), abs=2e-3)


@pytest.mark.parametrize("context", ["User: I would like to find a restaurant.", LONG])
def test_generated_text(context: str, scorer: Scorer, reference: Reference) -> None:
    wanted = reference.generate(context, 40)
    assert scorer.generate(context, {"max_gen_toks": 40}, 0) == wanted
    stop = wanted[10:13]
    found = scorer.generate(context, {"max_gen_toks": 40, "until": [stop]}, 0)
    assert found == wanted.split(stop)[0]


def test_a_continuation_must_fit(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="the continuation has"):
        scorer.loglikelihood("A", LONG)
    with pytest.raises(ValueError, match="no tokens"):
        scorer.loglikelihood("A", "")
