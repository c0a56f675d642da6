"""Log-likelihoods and completions of a served model, item by item, as lm_eval's ``hf`` model
defines them: its split of context and continuation, its windows, its truncation on the left."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import tokenizers

from venturi._client import Client
from venturi._errors import RateLimitError, UnavailableError, VenturiError
from venturi._options import Chat, GenerateOptions
from venturi._types import Generation, Model

T = TypeVar("T")

DEFAULT_MAX_GEN_TOKS = 256
_SHORTEST_WAIT_S = 0.1
# Names that tasks give to the number of new tokens, by priority.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {
    *_MAX_TOKENS,
    "until",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "num_beams",
}


class Tokenizer:
    """The served model's tokenizer, here.

    ``prefix_id`` is what an item without a context follows: the begin token, else the end token.
    """

    def __init__(self, files: Mapping[str, bytes], prefix_id: int | None) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        self.eos_id = self._id_of(config.get("eos_token"))
        begin = self._id_of(config.get("bos_token"))
        found = next((each for each in (prefix_id, begin, self.eos_id) if each is not None), None)
        if found is None:
            raise ValueError(
                "this tokenizer names no begin and no end token: give prefix_token_id=ID"
            )
        self.prefix_id = found
        self._prefix = self._tokenizer.decode([found], skip_special_tokens=False)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {each.content: number for number, each in added.items() if each.special}
        self.encode = lru_cache(maxsize=4096)(self._encode)

    def _id_of(self, token: Any) -> int | None:
        text = token["content"] if isinstance(token, dict) else token
        return None if text is None else self._tokenizer.token_to_id(text)

    def _encode(self, text: str, special: bool | None = None) -> tuple[int, ...]:
        """Ids of ``text``; None adds special tokens unless the text begins with one."""
        if special is None:
            special = not (self._prefix and text.startswith(self._prefix))
        return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def split(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a context and of what follows it, which are encoded together."""
        if not context:
            ids = self.encode(continuation, False)
            return (ids[:1], ids[1:]) if ids[:1] == (self.prefix_id,) else ((self.prefix_id,), ids)
        bare = context.rstrip()
        whole = self._encode(context + continuation)
        head = self.encode(bare)
        return head or (self.prefix_id,), whole[len(head) :]

    def stops(self, texts: Sequence[str]) -> tuple[list[str], list[int]]:
        """Stop strings, and ids of those that are special tokens, which no text shows."""
        ids = {self._special[text] for text in texts if text in self._special}
        if self.eos_id is not None:
            ids.add(self.eos_id)
        return [text for text in texts if text and text not in self._special], sorted(ids)


class Scorer:
    """Threads may share it.

    ``max_length`` is the most tokens that a prediction may follow. The server also needs the
    last token of an item and room for one more, hence two fewer than it holds are the most.
    ``timeout_s`` is for one item, with all waits while the server is full or away.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        *,
        max_length: int | None,
        prefix_id: int | None,
        timeout_s: float,
    ) -> None:
        self._client = client
        self._name = model
        self._timeout_s = timeout_s
        self.model: Model = self._patiently(lambda left: client.model(model, timeout=left))
        files = self._patiently(lambda left: client.tokenizer_files(model, timeout=left))
        self.tokenizer = Tokenizer(files, prefix_id)
        cache = self.model.kv_cache
        longest = min(self.model.context_length, cache.blocks * cache.block_size) - 2
        self.max_length = longest if max_length is None else max_length
        if not 1 <= self.max_length <= longest:
            raise ValueError(f"max_length is {max_length}; this server allows 1 to {longest}")

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Natural log-probability of ``continuation``, and whether greedy decoding gives it."""
        return self._of_tokens(*self.tokenizer.split(context, continuation))

    def rolling(self, text: str) -> float:
        """Natural log-probability of a text of any length, each token predicted once."""
        tokens = self.tokenizer.encode(text)
        windows = rolling_windows(tokens, self.tokenizer.prefix_id, self.max_length)
        return sum(self._of_tokens(context, predicted)[0] for context, predicted in windows)

    def generate(self, context: str, options: Mapping[str, Any], number: int) -> str:
        """Text that follows ``context``, up to the first of ``until``.

        A ``seed`` is the first item's; item ``number`` has one that is larger by it.
        """
        request = sampling(options, number)
        limit = _max_tokens(options)
        room = self.max_length - limit
        if room < 1:
            raise ValueError(f"max_gen_toks is {limit}; the model holds {self.max_length} tokens")
        prompt = self.tokenizer.encode(context)[-room:] or (self.tokenizer.prefix_id,)
        until = options.get("until") or []
        stops, stop_ids = self.tokenizer.stops([until] if isinstance(until, str) else until)
        request |= {"max_tokens": limit, "stop": stops, "stop_token_ids": stop_ids}
        return self._generate(prompt, request).text

    def render(
        self, messages: Chat, add_generation_prompt: bool, template_kwargs: Mapping[str, object]
    ) -> str:
        """The messages in the model's chat template. Where no turn is opened, the text ends with
        the last message, for the model to continue it."""
        text = self._patiently(
            lambda left: self._client.tokenize(
                messages,
                model=self._name,
                add_generation_prompt=add_generation_prompt,
                template_kwargs=template_kwargs,
                timeout=left,
            )
        ).text
        if add_generation_prompt:
            return text
        last = messages[-1]["content"].strip()
        found = text.rfind(last)
        if found < 0:
            raise ValueError("the chat template changes the last message: it cannot be continued")
        return text[: found + len(last)]

    def _of_tokens(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        if not continuation:
            raise ValueError("the continuation has no tokens")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"the continuation has {len(continuation)} tokens; the model holds "
                f"{self.max_length}"
            )
        whole = [*context, *continuation][-(self.max_length + 1) :]
        request: GenerateOptions = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        response = self._generate(whole, request)
        scored = response.prompt_logprobs[-len(continuation) :]
        if len(scored) != len(continuation):
            raise VenturiError(
                f"the server scored {len(scored)} of the continuation's {len(continuation)} tokens"
            )
        return sum(each.logprob for each in scored), all(each.rank == 1 for each in scored)

    def _generate(self, prompt: Sequence[int], request: GenerateOptions) -> Generation:
        request["model"] = self._name

        def send(left_s: float) -> Generation:
            request["timeout"] = left_s
            return self._client.generate(prompt, **request)

        response = self._patiently(send)
        # A server that falls back answers for another variant: its scores are no part of these.
        answered = f"{response.model}@{response.variant}"
        evaluated = f"{self.model.name}@{self.model.variant}"
        if answered != evaluated:
            raise VenturiError(f"{answered} answered, and {evaluated} is evaluated: begin anew")
        return response

    def _patiently(self, send: Callable[[float], T]) -> T:
        """Tries again, for as long as an item may take, where the server says when."""
        end = time.monotonic() + self._timeout_s
        while True:
            try:
                return send(max(end - time.monotonic(), _SHORTEST_WAIT_S))
            except (RateLimitError, UnavailableError) as error:
                if error.retry_after is None:
                    raise
                wait = max(error.retry_after, _SHORTEST_WAIT_S)
                if time.monotonic() + wait > end:
                    raise
                time.sleep(wait)


def rolling_windows(
    tokens: Sequence[int], prefix_id: int, max_length: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Contexts and the tokens that follow them, so that each token is predicted once.

    The first window follows ``prefix_id``; later ones have a context of one token, the last one
    as many as fit.
    """
    if tokens:
        yield (prefix_id,), tokens[:max_length]
    for begin in range(max_length, len(tokens), max_length):
        end = min(begin + max_length, len(tokens))
        yield tokens[end - max_length - 1 : begin], tokens[begin:end]


def sampling(options: Mapping[str, Any], number: int) -> GenerateOptions:
    """Options of a request. Raises ValueError for what a request cannot hold."""
    if unknown := options.keys() - _KNOWN:
        names = ", ".join(sorted(_KNOWN))
        raise ValueError(f"generation option {min(unknown)!r} is not known; there are {names}")
    if options.get("num_beams", 1) != 1:
        raise ValueError("num_beams: there is no beam search")
    request: GenerateOptions = {
        "repetition_penalty": options.get("repetition_penalty"),
        "presence_penalty": options.get("presence_penalty"),
        "frequency_penalty": options.get("frequency_penalty"),
    }
    temperature, sampled = options.get("temperature"), options.get("do_sample")
    if not (temperature if sampled is None else sampled):
        request["temperature"] = 0.0
        return request
    request["temperature"] = 1.0 if temperature is None else float(temperature)
    request["top_p"] = options.get("top_p")
    request["top_k"] = options.get("top_k")
    request["min_p"] = options.get("min_p")
    seed = options.get("seed")
    request["seed"] = None if seed is None else seed + number
    return request


def _max_tokens(options: Mapping[str, Any]) -> int:
    given = (options[name] for name in _MAX_TOKENS if options.get(name) is not None)
    return int(next(given, DEFAULT_MAX_GEN_TOKS))
