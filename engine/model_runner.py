"""Owns the model and the KV tensors; runs a scheduled batch."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch

from engine import batch as batches
from engine.config import CacheConfig, EngineConfig, MonitorConfig
from engine.constraints import Constraints
from engine.endings import NOT_FINITE, NOTHING_LEFT, OVER_LIMITS
from engine.errors import ModelLoadError
from engine.figures import StepFigures
from engine.kernels import kernel, resolve
from engine.kv_cache import KvCache, KvShape, cache_class
from engine.layers.linear import Linear, Split, activations
from engine.loader import LoadedModel, Progress, load
from engine.logprobs import LogprobsReport, prompt_logprobs
from engine.monitor import Monitor
from engine.penalties import add_bias, changes, forbid_ends
from engine.sampler import sample
from engine.self_test import check_linear
from engine.types import (
    Constraint,
    ModelReport,
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StepResult,
    StoppingParams,
)

_ONE_THREAD_BYTES = 32 << 20


class _Row(NamedTuple):
    """Logits that a token is sampled from: those ``after`` so many drafts of an item."""

    item: int
    sequence: Sequence
    after: int


class ModelRunner:
    """A loaded model with its cache. ``run`` is the step's only arithmetic."""

    def __init__(
        self,
        model: LoadedModel,
        constraints: Constraints,
        cache: KvCache,
        block_size: int,
        blocks: int,
        backend: str,
        monitor: MonitorConfig,
    ) -> None:
        self._model = model
        self._constraints = constraints
        self._cache = cache
        self.block_size = block_size
        self.num_blocks = blocks
        self._backend = backend
        self._monitor = Monitor(monitor, len(model.decoder.layers))

    @classmethod
    def from_config(
        cls, config: EngineConfig, progress: Progress = lambda item, items: None
    ) -> "ModelRunner":
        """Loads the model, tests its kernels and allocates the cache. ``ModelLoadError``."""
        with torch.inference_mode():
            backend = resolve(config.kernels.backend)
            if config.kernels.threads:
                torch.set_num_threads(config.kernels.threads)  # sparse layers are timed at load
            model = load(
                config.model_dir,
                backend,
                progress,
                allow_slow=config.kernels.allow_slow,
                int8_weights=config.kernels.int8_weights,
            )
            torch.set_num_threads(config.kernels.threads or _default_threads(model))
            for linear in model.linears:
                check_linear(linear)
            spec = model.decoder.spec
            constraints = Constraints.from_folder(config.model_dir, spec.vocabulary_size)
            place = _allocate(config, model, backend)
            runner = cls(model, constraints, *place, backend, config.monitor)
        runner.warm_up()
        return runner

    def warm_up(self) -> None:
        """A prompt and a decode step in the first block: first calls of torch are slow."""
        request = Request(
            id="warm-up",
            prompt=[0] * max(1, min(self.block_size, self.context_length) - 1),
            sampling=SamplingParams(temperature=1.0),
            stopping=StoppingParams(max_tokens=1),
            arrival=0.0,
        )
        sequence = Sequence(request, list(request.prompt), block_table=[0])
        for _ in range(2):
            self.run(ScheduledBatch([ScheduledSequence(sequence, sequence.uncomputed)]))
            sequence.computed = len(sequence.tokens) - 1

    @property
    def context_length(self) -> int:
        """Positions that the model knows."""
        return self._model.decoder.spec.context_length

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """The next tokens of each item that samples, 0 for the others; log-probabilities."""
        inputs, decoder = batches.build(batch, self.block_size), self._model.decoder
        look = self._monitor.look()
        hidden_TK = decoder.hidden(inputs, self._cache, None if look is None else look.observe)
        result = StepResult([0] * len(batch.items))
        broken = 0
        result.prompts.extend(prompt_logprobs(batch, hidden_TK, decoder.logits, self._backend))
        rows = [
            _Row(index, item.sequence, after)
            for index, item in enumerate(batch.items)
            if item.samples
            for after in range(1 + len(item.drafts))
        ]
        if rows:
            logits_RV = decoder.logits(hidden_TK[inputs.rows_R])
            if look is not None:
                look.logits(logits_RV)
            sequences = [row.sequence for row in rows]
            changing = any(changes(one) or one.request.sampling.constraint for one in sequences)
            report = LogprobsReport(logits_RV, sequences, changing=changing, backend=self._backend)
            tokens = self._sample(logits_RV, rows, changing=changing)
            broken = tokens.count(NOT_FINITE)
            for row, token in zip(rows, tokens, strict=True):
                if row.after == 0:
                    result.tokens[row.item] = token
                else:
                    result.after_drafts.setdefault(row.item, []).append(token)
            for number, logprobs in report.of(tokens).items():
                result.logprobs[rows[number].item] = logprobs
        if look is not None:
            result.figures = look.figures(self._cache, inputs.context.slots_T, broken)
        elif broken:
            result.figures = StepFigures(non_finite_logits=broken)
        return result

    def _sample(self, logits_RV: torch.Tensor, rows: list["_Row"], *, changing: bool) -> list[int]:
        """``changing`` says that something changes ``logits_RV`` before."""
        sequences = [row.sequence for row in rows]

        def edit(logits_RV: torch.Tensor) -> None:
            add_bias(logits_RV, sequences)
            kernel("penalise", self._backend)(logits_RV, sequences)
            self._constraints.mask(logits_RV, sequences)
            forbid_ends(logits_RV, sequences)

        tokens = sample(
            logits_RV,
            [row.sequence.request.sampling for row in rows],
            [row.sequence.generated + row.after for row in rows],
            [row.sequence.choice for row in rows],
            edit if changing else None,
            self._backend,
        )
        for number, token in enumerate(tokens):
            if token == NOTHING_LEFT and self._constraints.is_over_limits(sequences[number]):
                tokens[number] = OVER_LIMITS
        return tokens

    def prepare(self, constraint: Constraint) -> None:
        """Compiles a constraint, in any thread. Raises ``InvalidRequest``."""
        self._constraints.compile(constraint)

    @torch.inference_mode()
    def logits(self, batch: ScheduledBatch) -> torch.Tensor:
        """float32 logits [T, V] of all of the batch's tokens, for scoring."""
        inputs = batches.build(batch, self.block_size)
        every = torch.arange(len(inputs.token_ids_T))
        inputs = batches.ModelInputs(inputs.token_ids_T, inputs.context, every)
        return self._model.decoder.forward(inputs, self._cache)

    def report(self, max_sequence_tokens: int) -> ModelReport:
        """What is in memory, read from the tensors."""
        spec, head = self._model.decoder.spec, self._model.decoder.head
        body = [linear for linear in _flat(self._model.linears) if linear is not head]
        return ModelReport(
            architecture=spec.architecture,
            context_length=spec.context_length,
            max_sequence_tokens=max_sequence_tokens,
            vocabulary_size=spec.vocabulary_size,
            parameters=self._model.parameters,
            weights=_storages(body),
            activations=activations(_largest(body)),
            head=head.storage,
            weight_bytes=sum(linear.nbytes for linear in self._model.linears),
            kernels=self._kernels([*body, head]),
            layers=self._model.layers,
            kv_dtype=self._cache.dtype,
            kv_block_size=self.block_size,
            kv_blocks=self.num_blocks,
            kv_bytes=self._cache.nbytes,
            format=self._model.format,
        )

    def _kernels(self, linears: list[Linear]) -> tuple[str, ...]:
        products = {f"{linear.storage}={linear.product}" for linear in linears}
        return tuple(sorted({*products, *self._model.sparse, f"attention={self._cache.kernel}"}))


def _default_threads(model: LoadedModel) -> int:
    """One for a model that a core's caches nearly hold, else all.

    There, waiting for a second thread at the end of each small kernel costs more than it
    brings, and where another process has that core the wait is a time slice.
    """
    weight_bytes = sum(linear.nbytes for linear in model.linears)
    return 1 if weight_bytes < _ONE_THREAD_BYTES else os.cpu_count() or 1


def _allocate(config: EngineConfig, model: LoadedModel, backend: str) -> tuple[KvCache, int, int]:
    spec, cache = model.decoder.spec, config.cache
    dtype = model.runtime.kv_dtype if cache.dtype == "auto" else cache.dtype
    kind = cache_class(dtype, backend, cache.block_size)
    shape = KvShape(
        layers=len(spec.names),
        kv_heads=spec.layer.kv_heads,
        head_dim=spec.layer.head_dim,
        block_size=cache.block_size,
    )
    most = config.scheduler.max_sequences * -(-spec.context_length // cache.block_size)
    blocks = _pool_blocks(cache, kind.block_bytes(shape), most)
    try:
        return kind(shape, blocks), cache.block_size, blocks
    except RuntimeError as error:
        raise ModelLoadError(
            f"no memory for {blocks} KV blocks: lower kv-memory or kv-blocks"
        ) from error


def _pool_blocks(cache: CacheConfig, block_bytes: int, most: int) -> int:
    if cache.blocks is not None:
        return cache.blocks
    blocks = min(cache.memory_bytes // block_bytes, most)
    if blocks < 1:
        raise ModelLoadError(f"kv-memory holds no block; one takes {block_bytes} bytes")
    return blocks


def _flat(linears: Iterable[Linear]) -> list[Linear]:
    return [part for one in linears for part in (one.parts if isinstance(one, Split) else (one,))]


def _largest(linears: list[Linear]) -> Linear:
    sizes: dict[str, int] = {}
    for linear in linears:
        sizes[linear.storage] = sizes.get(linear.storage, 0) + linear.nbytes
    storage = max(sizes, key=lambda name: sizes[name])
    return next(linear for linear in linears if linear.storage == storage)


def _storages(linears: list[Linear]) -> str:
    """Such as "int8 and int4": what takes most bytes first."""
    nbytes: dict[str, int] = {}
    for linear in linears:
        nbytes[linear.storage] = nbytes.get(linear.storage, 0) + linear.nbytes
    return " and ".join(sorted(nbytes, key=lambda storage: -nbytes[storage]))
