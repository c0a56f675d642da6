from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetTokenizerResponse(_message.Message):
    __slots__ = ("file_name", "data", "total_bytes", "sha256")
    FILE_NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    file_name: str
    data: bytes
    total_bytes: int
    sha256: str
    def __init__(self, file_name: _Optional[str] = ..., data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "variant", "architecture", "context_length", "vocabulary_size", "parameters", "has_chat_template", "precision", "kv_cache", "provenance", "layers", "quality", "speed", "eos_token_ids", "monitoring", "fallback")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MONITORING_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    name: str
    variant: str
    architecture: str
    context_length: int
    vocabulary_size: int
    parameters: int
    has_chat_template: bool
    precision: Precision
    kv_cache: KvCache
    provenance: Provenance
    layers: _containers.RepeatedCompositeFieldContainer[LayerSummary]
    quality: MeasuredQuality
    speed: MeasuredSpeed
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    monitoring: Monitoring
    fallback: Fallback
    def __init__(self, name: _Optional[str] = ..., variant: _Optional[str] = ..., architecture: _Optional[str] = ..., context_length: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., parameters: _Optional[int] = ..., has_chat_template: _Optional[bool] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., kv_cache: _Optional[_Union[KvCache, _Mapping]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerSummary, _Mapping]]] = ..., quality: _Optional[_Union[MeasuredQuality, _Mapping]] = ..., speed: _Optional[_Union[MeasuredSpeed, _Mapping]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., monitoring: _Optional[_Union[Monitoring, _Mapping]] = ..., fallback: _Optional[_Union[Fallback, _Mapping]] = ...) -> None: ...

class Monitoring(_message.Message):
    __slots__ = ("sampled_steps", "non_finite_logits", "entropy_nats", "reference_entropy_nats", "entropy_shift_nats", "layers", "alarms")
    SAMPLED_STEPS_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_LOGITS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_NATS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_ENTROPY_NATS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_SHIFT_NATS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    sampled_steps: int
    non_finite_logits: int
    entropy_nats: float
    reference_entropy_nats: float
    entropy_shift_nats: float
    layers: _containers.RepeatedCompositeFieldContainer[LayerActivity]
    alarms: _containers.RepeatedCompositeFieldContainer[Alarm]
    def __init__(self, sampled_steps: _Optional[int] = ..., non_finite_logits: _Optional[int] = ..., entropy_nats: _Optional[float] = ..., reference_entropy_nats: _Optional[float] = ..., entropy_shift_nats: _Optional[float] = ..., layers: _Optional[_Iterable[_Union[LayerActivity, _Mapping]]] = ..., alarms: _Optional[_Iterable[_Union[Alarm, _Mapping]]] = ...) -> None: ...

class LayerActivity(_message.Message):
    __slots__ = ("zeroed_share", "saturated_share", "outlier_ratio", "non_finite", "kv_non_finite")
    ZEROED_SHARE_FIELD_NUMBER: _ClassVar[int]
    SATURATED_SHARE_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_RATIO_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_FIELD_NUMBER: _ClassVar[int]
    KV_NON_FINITE_FIELD_NUMBER: _ClassVar[int]
    zeroed_share: float
    saturated_share: float
    outlier_ratio: float
    non_finite: int
    kv_non_finite: int
    def __init__(self, zeroed_share: _Optional[float] = ..., saturated_share: _Optional[float] = ..., outlier_ratio: _Optional[float] = ..., non_finite: _Optional[int] = ..., kv_non_finite: _Optional[int] = ...) -> None: ...

class Alarm(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    def __init__(self, kind: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Fallback(_message.Message):
    __slots__ = ("variant", "reason")
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    variant: str
    reason: str
    def __init__(self, variant: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Precision(_message.Message):
    __slots__ = ("weights", "activations", "head", "weight_bytes", "kernels")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    weights: str
    activations: str
    head: str
    weight_bytes: int
    kernels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, weights: _Optional[str] = ..., activations: _Optional[str] = ..., head: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., kernels: _Optional[_Iterable[str]] = ...) -> None: ...

class KvCache(_message.Message):
    __slots__ = ("dtype", "block_size", "blocks", "bytes")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    block_size: int
    blocks: int
    bytes: int
    def __init__(self, dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Provenance(_message.Message):
    __slots__ = ("recipe", "recipe_sha256", "weights_sha256", "format", "venturi_version", "artefact")
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    RECIPE_SHA256_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    VENTURI_VERSION_FIELD_NUMBER: _ClassVar[int]
    ARTEFACT_FIELD_NUMBER: _ClassVar[int]
    recipe: str
    recipe_sha256: str
    weights_sha256: str
    format: str
    venturi_version: str
    artefact: str
    def __init__(self, recipe: _Optional[str] = ..., recipe_sha256: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., format: _Optional[str] = ..., venturi_version: _Optional[str] = ..., artefact: _Optional[str] = ...) -> None: ...

class LayerSummary(_message.Message):
    __slots__ = ("name", "storage", "execution", "method", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    EXECUTION_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    storage: str
    execution: str
    method: str
    bytes: int
    def __init__(self, name: _Optional[str] = ..., storage: _Optional[str] = ..., execution: _Optional[str] = ..., method: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class MeasuredQuality(_message.Message):
    __slots__ = ("mean_kl_nats", "perplexity", "original_perplexity", "tokens", "data_sha256", "verdict", "explanation", "restored_layers")
    MEAN_KL_NATS_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DATA_SHA256_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    RESTORED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    mean_kl_nats: float
    perplexity: float
    original_perplexity: float
    tokens: int
    data_sha256: str
    verdict: str
    explanation: str
    restored_layers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, mean_kl_nats: _Optional[float] = ..., perplexity: _Optional[float] = ..., original_perplexity: _Optional[float] = ..., tokens: _Optional[int] = ..., data_sha256: _Optional[str] = ..., verdict: _Optional[str] = ..., explanation: _Optional[str] = ..., restored_layers: _Optional[_Iterable[str]] = ...) -> None: ...

class MeasuredSpeed(_message.Message):
    __slots__ = ("prefill", "decode_1", "decode_8", "decode_32")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_1_FIELD_NUMBER: _ClassVar[int]
    DECODE_8_FIELD_NUMBER: _ClassVar[int]
    DECODE_32_FIELD_NUMBER: _ClassVar[int]
    prefill: float
    decode_1: float
    decode_8: float
    decode_32: float
    def __init__(self, prefill: _Optional[float] = ..., decode_1: _Optional[float] = ..., decode_8: _Optional[float] = ..., decode_32: _Optional[float] = ...) -> None: ...
