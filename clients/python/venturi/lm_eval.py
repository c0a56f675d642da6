"""The model ``venturi`` of lm-evaluation-harness: runs its tasks against a served model.

    venturi lm-eval --model_args target=127.0.0.1:50051 --tasks gsm8k

Needs the package lm_eval: ``pip install 'venturi-client[lm-eval]'``.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import lm_eval.models  # noqa: F401  registered now: lm_eval does it only where none is there yet
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from venturi._client import Client
from venturi._errors import VenturiError
from venturi._options import Chat
from venturi._scoring import Scorer

T = TypeVar("T")


@register_model("venturi")
class VenturiLM(LM):  # type: ignore[misc]  # lm_eval is no dependency of the type check
    """A served model as lm_eval calls it. Every request that fails is named."""

    def __init__(
        self,
        *,
        target: str | None = None,
        model: str = "",
        concurrency: int = 8,
        timeout: float = 600.0,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        **harness: object,
    ) -> None:
        """Connects. Raises ``VenturiError`` where no server answers.

        Args:
            target: The server's host:port. Default: VENTURI_TARGET, else 127.0.0.1:50051.
            model: name or name@variant; "" is the default model.
            concurrency: Requests that are open at a time.
            timeout: Seconds for one item, with waits while the server is full or restarts.
            max_length: Most tokens that a prediction follows; longer items lose their beginning.
            prefix_token_id: What an item without a context follows. Default: the tokenizer's
                begin token, else its end token.
            enable_thinking: That variable of the chat template.
            think_end_token: Only the text after it is the answer, such as ``</think>``.
            harness: ``batch_size``, ``max_batch_size`` and ``device``, which lm_eval always
                gives; the server decides these.
        """
        super().__init__()
        if unknown := harness.keys() - {"batch_size", "max_batch_size", "device"}:
            raise TypeError(f"the model venturi has no argument {min(unknown)!r}")
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it must be 1 or more")
        self._concurrency = concurrency
        self._think_end = think_end_token
        self._template_kwargs = (
            {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        )
        client = Client(target, timeout=timeout, max_retries=4)
        self._scorer = Scorer(
            client, model, max_length=max_length, prefix_id=prefix_token_id, timeout_s=timeout
        )

    @property
    def tokenizer_name(self) -> str:
        """Names prompts that lm_eval keeps."""
        return f"{self._scorer.model.name}@{self._scorer.model.variant}"

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): its log-probability, and whether it is greedy."""
        return self._all(
            "loglikelihood",
            requests,
            lambda _, request: self._scorer.loglikelihood(*request.args),
            disable_tqdm,
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text."""
        return self._all(
            "loglikelihood_rolling",
            requests,
            lambda _, request: self._scorer.rolling(*request.args),
            disable_tqdm,
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each (context, options)."""
        return self._all("generate_until", requests, self._answer, disable_tqdm)

    def apply_chat_template(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        """The messages in the served model's template."""
        return self._scorer.render(chat_history, add_generation_prompt, self._template_kwargs)

    def get_model_info(self) -> dict[str, str]:
        """What was evaluated, as found in the server's memory; lm_eval keeps it with results."""
        model = self._scorer.model
        return {
            "served_model": f"{model.name}@{model.variant}",
            "served_recipe": model.provenance.recipe,
            "served_weights": model.precision.weights,
            "served_activations": model.precision.activations,
            "served_kv_cache": model.kv_cache.dtype,
            "served_weights_sha256": model.provenance.weights_sha256,
        }

    def _answer(self, number: int, request: Any) -> str:
        context, options = request.args
        text = self._scorer.generate(context, options, number)
        if self._think_end is not None:
            text = text.split(self._think_end)[-1].lstrip()
        return text

    def _all(
        self,
        kind: str,
        requests: Sequence[Any],
        answer: Callable[[int, Any], T],
        disable_tqdm: bool,
    ) -> list[T]:
        """Answers in the order of the requests; each is given to lm_eval's cache when it is
        there. The first failure ends what has not begun."""
        answers: list[T] = []
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            futures = [pool.submit(answer, *each) for each in enumerate(requests)]
            pairs = zip(requests, futures, strict=True)
            for request, future in tqdm(
                pairs, f"Running {kind} requests", len(futures), disable=disable_tqdm
            ):
                try:
                    answers.append(future.result())
                except (VenturiError, ValueError) as error:
                    raise VenturiError(f"{_name_of(request)}: {error}") from error
                self.cache_hook.add_partial(kind, request.args, answers[-1])
        finally:
            pool.shutdown(cancel_futures=True)
        return answers


def _name_of(request: Any) -> str:
    return f"task {request.task_name}, document {request.doc_id}, request {request.idx}"
