import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_STARTING: _ClassVar[Phase]
    PHASE_COMPRESSING: _ClassVar[Phase]
    PHASE_EVALUATING: _ClassVar[Phase]
    PHASE_LOADING: _ClassVar[Phase]
    PHASE_READY: _ClassVar[Phase]
    PHASE_FAILED: _ClassVar[Phase]
    PHASE_RESTARTING: _ClassVar[Phase]
    PHASE_DRAINING: _ClassVar[Phase]
    PHASE_UNRESPONSIVE: _ClassVar[Phase]
PHASE_UNSPECIFIED: Phase
PHASE_STARTING: Phase
PHASE_COMPRESSING: Phase
PHASE_EVALUATING: Phase
PHASE_LOADING: Phase
PHASE_READY: Phase
PHASE_FAILED: Phase
PHASE_RESTARTING: Phase
PHASE_DRAINING: Phase
PHASE_UNRESPONSIVE: Phase

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("queued", "running", "kv_blocks_used", "kv_blocks_free", "kv_blocks_cached", "tokens_per_second", "prompt_tokens_total", "completion_tokens_total", "preemptions_total", "engine_restarts_total")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_RESTARTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    queued: int
    running: int
    kv_blocks_used: int
    kv_blocks_free: int
    kv_blocks_cached: int
    tokens_per_second: float
    prompt_tokens_total: int
    completion_tokens_total: int
    preemptions_total: int
    engine_restarts_total: int
    def __init__(self, queued: _Optional[int] = ..., running: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., prompt_tokens_total: _Optional[int] = ..., completion_tokens_total: _Optional[int] = ..., preemptions_total: _Optional[int] = ..., engine_restarts_total: _Optional[int] = ...) -> None: ...

class WatchStartupRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStartupResponse(_message.Message):
    __slots__ = ("phase", "detail", "item", "items", "time_left")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    detail: str
    item: int
    items: int
    time_left: _duration_pb2.Duration
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., detail: _Optional[str] = ..., item: _Optional[int] = ..., items: _Optional[int] = ..., time_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SetTrafficRequest(_message.Message):
    __slots__ = ("weights", "shadow", "kill_switch")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    KILL_SWITCH_FIELD_NUMBER: _ClassVar[int]
    weights: _containers.RepeatedCompositeFieldContainer[VariantWeight]
    shadow: str
    kill_switch: bool
    def __init__(self, weights: _Optional[_Iterable[_Union[VariantWeight, _Mapping]]] = ..., shadow: _Optional[str] = ..., kill_switch: _Optional[bool] = ...) -> None: ...

class VariantWeight(_message.Message):
    __slots__ = ("variant", "weight")
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    variant: str
    weight: float
    def __init__(self, variant: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class SetTrafficResponse(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _containers.RepeatedCompositeFieldContainer[VariantWeight]
    def __init__(self, weights: _Optional[_Iterable[_Union[VariantWeight, _Mapping]]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout",)
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    timeout: _duration_pb2.Duration
    def __init__(self, timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("completed", "aborted")
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    completed: int
    aborted: int
    def __init__(self, completed: _Optional[int] = ..., aborted: _Optional[int] = ...) -> None: ...
