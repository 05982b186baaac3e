from scalellm.v1 import link_pb2 as _link_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetExecutorInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetExecutorInfoResponse(_message.Message):
    __slots__ = ("instance_id", "model", "architecture", "dtype", "device", "backend", "block_size", "max_model_len", "max_num_seqs", "load", "steps", "accepted", "finished", "cancelled", "rejected", "preemptions", "prefix_cache_queries", "prefix_cache_hits", "kernels", "late_compiles", "kv_cache_dtype", "quantization", "swaps", "stats", "weights", "other_weights", "tensor_parallel", "expert_parallel", "speculation", "instructions", "unused_instructions")
    class KernelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class UnusedInstructionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    LATE_COMPILES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    SWAPS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    OTHER_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    UNUSED_INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    model: str
    architecture: str
    dtype: str
    device: str
    backend: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    load: _link_pb2.Load
    steps: int
    accepted: int
    finished: int
    cancelled: int
    rejected: int
    preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    kernels: _containers.ScalarMap[str, str]
    late_compiles: int
    kv_cache_dtype: str
    quantization: str
    swaps: int
    stats: EngineStats
    weights: WeightForm
    other_weights: WeightForm
    tensor_parallel: int
    expert_parallel: int
    speculation: str
    instructions: str
    unused_instructions: _containers.ScalarMap[str, str]
    def __init__(self, instance_id: _Optional[str] = ..., model: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., backend: _Optional[str] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., load: _Optional[_Union[_link_pb2.Load, _Mapping]] = ..., steps: _Optional[int] = ..., accepted: _Optional[int] = ..., finished: _Optional[int] = ..., cancelled: _Optional[int] = ..., rejected: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_cache_queries: _Optional[int] = ..., prefix_cache_hits: _Optional[int] = ..., kernels: _Optional[_Mapping[str, str]] = ..., late_compiles: _Optional[int] = ..., kv_cache_dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., swaps: _Optional[int] = ..., stats: _Optional[_Union[EngineStats, _Mapping]] = ..., weights: _Optional[_Union[WeightForm, _Mapping]] = ..., other_weights: _Optional[_Union[WeightForm, _Mapping]] = ..., tensor_parallel: _Optional[int] = ..., expert_parallel: _Optional[int] = ..., speculation: _Optional[str] = ..., instructions: _Optional[str] = ..., unused_instructions: _Optional[_Mapping[str, str]] = ...) -> None: ...

class WeightForm(_message.Message):
    __slots__ = ("quantization", "type", "bytes")
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    quantization: str
    type: str
    bytes: int
    def __init__(self, quantization: _Optional[str] = ..., type: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class EngineStats(_message.Message):
    __slots__ = ("generated_tokens", "computed_tokens", "failed_steps", "swapped_out_blocks", "swapped_in_blocks", "running_sequences", "waiting_sequences", "cached_blocks", "free_host_blocks", "total_host_blocks", "step_seconds", "step_tokens", "step_sequences", "queue_seconds", "drafts", "draft_tokens", "accepted_tokens")
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_STEPS_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_OUT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_IN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    generated_tokens: int
    computed_tokens: int
    failed_steps: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    running_sequences: int
    waiting_sequences: int
    cached_blocks: int
    free_host_blocks: int
    total_host_blocks: int
    step_seconds: Histogram
    step_tokens: Histogram
    step_sequences: Histogram
    queue_seconds: Histogram
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    def __init__(self, generated_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., failed_steps: _Optional[int] = ..., swapped_out_blocks: _Optional[int] = ..., swapped_in_blocks: _Optional[int] = ..., running_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., free_host_blocks: _Optional[int] = ..., total_host_blocks: _Optional[int] = ..., step_seconds: _Optional[_Union[Histogram, _Mapping]] = ..., step_tokens: _Optional[_Union[Histogram, _Mapping]] = ..., step_sequences: _Optional[_Union[Histogram, _Mapping]] = ..., queue_seconds: _Optional[_Union[Histogram, _Mapping]] = ..., drafts: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("bounds", "counts", "total")
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    bounds: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    total: float
    def __init__(self, bounds: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., total: _Optional[float] = ...) -> None: ...

class DrainExecutorRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: int
    def __init__(self, timeout_s: _Optional[int] = ...) -> None: ...

class DrainExecutorResponse(_message.Message):
    __slots__ = ("remaining",)
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    remaining: int
    def __init__(self, remaining: _Optional[int] = ...) -> None: ...

class TracedRequest(_message.Message):
    __slots__ = ("request_id", "traceparent", "tracestate", "submitted_at_ns", "finish")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    traceparent: str
    tracestate: str
    submitted_at_ns: int
    finish: _link_pb2.Finish
    def __init__(self, request_id: _Optional[str] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., submitted_at_ns: _Optional[int] = ..., finish: _Optional[_Union[_link_pb2.Finish, _Mapping]] = ...) -> None: ...
