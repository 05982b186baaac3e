from scalellm.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AbortReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ABORT_REASON_UNSPECIFIED: _ClassVar[AbortReason]
    ABORT_REASON_CANCELLED: _ClassVar[AbortReason]
    ABORT_REASON_STOP: _ClassVar[AbortReason]
    ABORT_REASON_DEADLINE: _ClassVar[AbortReason]
ABORT_REASON_UNSPECIFIED: AbortReason
ABORT_REASON_CANCELLED: AbortReason
ABORT_REASON_STOP: AbortReason
ABORT_REASON_DEADLINE: AbortReason

class ClientFrame(_message.Message):
    __slots__ = ("hello", "submit", "abort", "renewal", "taken")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RENEWAL_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    abort: Abort
    renewal: Renewal
    taken: Taken
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., renewal: _Optional[_Union[Renewal, _Mapping]] = ..., taken: _Optional[_Union[Taken, _Mapping]] = ...) -> None: ...

class Taken(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: int
    def __init__(self, frames: _Optional[int] = ...) -> None: ...

class Renewal(_message.Message):
    __slots__ = ("queued_requests", "queued_tokens", "queued_tenants")
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TENANTS_FIELD_NUMBER: _ClassVar[int]
    queued_requests: int
    queued_tokens: int
    queued_tenants: int
    def __init__(self, queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., queued_tenants: _Optional[int] = ...) -> None: ...

class ServerFrame(_message.Message):
    __slots__ = ("welcome", "step")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepOutput
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("client_id", "api_minor", "tokenizer_sha256", "model", "unserved", "service")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    API_MINOR_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UNSERVED_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    api_minor: int
    tokenizer_sha256: bytes
    model: str
    unserved: int
    service: str
    def __init__(self, client_id: _Optional[str] = ..., api_minor: _Optional[int] = ..., tokenizer_sha256: _Optional[bytes] = ..., model: _Optional[str] = ..., unserved: _Optional[int] = ..., service: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("instance_id", "api_minor", "model", "tokenizer_sha256", "block_size", "num_blocks", "max_model_len", "max_num_seqs", "vocab_size", "load", "lease_ns", "grammars", "counts_frames", "tensor_parallel", "devices")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    API_MINOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LEASE_NS_FIELD_NUMBER: _ClassVar[int]
    GRAMMARS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FRAMES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    api_minor: int
    model: str
    tokenizer_sha256: bytes
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    load: Load
    lease_ns: int
    grammars: bool
    counts_frames: bool
    tensor_parallel: int
    devices: int
    def __init__(self, instance_id: _Optional[str] = ..., api_minor: _Optional[int] = ..., model: _Optional[str] = ..., tokenizer_sha256: _Optional[bytes] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., vocab_size: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., lease_ns: _Optional[int] = ..., grammars: _Optional[bool] = ..., counts_frames: _Optional[bool] = ..., tensor_parallel: _Optional[int] = ..., devices: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request_id", "token_ids", "resumed", "sampling", "priority", "time_remaining_ns", "cache_salt", "traceparent", "session_id", "tracestate", "charged_tokens", "tenant", "execution_id", "attempt", "grammar", "tenant_weight", "prediction_token_ids", "in_place_of")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TIME_REMAINING_NS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    CHARGED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    EXECUTION_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    TENANT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IN_PLACE_OF_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    resumed: _containers.RepeatedCompositeFieldContainer[ResumedSample]
    sampling: _common_pb2.SamplingParams
    priority: int
    time_remaining_ns: int
    cache_salt: bytes
    traceparent: str
    session_id: str
    tracestate: str
    charged_tokens: int
    tenant: bytes
    execution_id: bytes
    attempt: int
    grammar: str
    tenant_weight: float
    prediction_token_ids: _containers.RepeatedScalarFieldContainer[int]
    in_place_of: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., resumed: _Optional[_Iterable[_Union[ResumedSample, _Mapping]]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., time_remaining_ns: _Optional[int] = ..., cache_salt: _Optional[bytes] = ..., traceparent: _Optional[str] = ..., session_id: _Optional[str] = ..., tracestate: _Optional[str] = ..., charged_tokens: _Optional[int] = ..., tenant: _Optional[bytes] = ..., execution_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., grammar: _Optional[str] = ..., tenant_weight: _Optional[float] = ..., prediction_token_ids: _Optional[_Iterable[int]] = ..., in_place_of: _Optional[_Iterable[int]] = ...) -> None: ...

class ResumedSample(_message.Message):
    __slots__ = ("index", "token_ids", "finished")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished: _common_pb2.FinishReason
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finished: _Optional[_Union[_common_pb2.FinishReason, str]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("handle", "index", "reason")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handle: int
    index: int
    reason: AbortReason
    def __init__(self, handle: _Optional[int] = ..., index: _Optional[int] = ..., reason: _Optional[_Union[AbortReason, str]] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("seq", "handles", "indices", "offsets", "counts", "token_ids", "logprobs", "prompt_logprobs", "finished_samples", "finished", "load")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    seq: int
    handles: _containers.RepeatedScalarFieldContainer[int]
    indices: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[LinkLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[LinkLogprobs]
    finished_samples: _containers.RepeatedCompositeFieldContainer[LinkSampleFinish]
    finished: _containers.RepeatedCompositeFieldContainer[Finish]
    load: Load
    def __init__(self, seq: _Optional[int] = ..., handles: _Optional[_Iterable[int]] = ..., indices: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[LinkLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[LinkLogprobs, _Mapping]]] = ..., finished_samples: _Optional[_Iterable[_Union[LinkSampleFinish, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[Finish, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class LinkLogprobs(_message.Message):
    __slots__ = ("handle", "index", "offset", "values")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    index: int
    offset: int
    values: _common_pb2.TokenLogprobs
    def __init__(self, handle: _Optional[int] = ..., index: _Optional[int] = ..., offset: _Optional[int] = ..., values: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

class LinkSampleFinish(_message.Message):
    __slots__ = ("handle", "index", "reason", "stop_token_id")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    handle: int
    index: int
    reason: _common_pb2.FinishReason
    stop_token_id: int
    def __init__(self, handle: _Optional[int] = ..., index: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("handle", "status", "usage", "timings", "moved", "tenant_full_ns")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    TENANT_FULL_NS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    status: LinkStatus
    usage: _common_pb2.Usage
    timings: HopTimings
    moved: bool
    tenant_full_ns: int
    def __init__(self, handle: _Optional[int] = ..., status: _Optional[_Union[LinkStatus, _Mapping]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., timings: _Optional[_Union[HopTimings, _Mapping]] = ..., moved: _Optional[bool] = ..., tenant_full_ns: _Optional[int] = ...) -> None: ...

class LinkStatus(_message.Message):
    __slots__ = ("code", "message", "field", "retry_after_ns")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_NS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    field: str
    retry_after_ns: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_ns: _Optional[int] = ...) -> None: ...

class HopTimings(_message.Message):
    __slots__ = ("executor_total_ns", "queue_ns", "prefill_ns", "decode_ns", "preempted_ns", "scheduler_total_ns", "admission_ns", "failover_ns", "executor_id")
    EXECUTOR_TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_NS_FIELD_NUMBER: _ClassVar[int]
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_NS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_NS_FIELD_NUMBER: _ClassVar[int]
    FAILOVER_NS_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_ID_FIELD_NUMBER: _ClassVar[int]
    executor_total_ns: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    preempted_ns: int
    scheduler_total_ns: int
    admission_ns: int
    failover_ns: int
    executor_id: str
    def __init__(self, executor_total_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., prefill_ns: _Optional[int] = ..., decode_ns: _Optional[int] = ..., preempted_ns: _Optional[int] = ..., scheduler_total_ns: _Optional[int] = ..., admission_ns: _Optional[int] = ..., failover_ns: _Optional[int] = ..., executor_id: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("free_blocks", "total_blocks", "running", "waiting", "waiting_prefill_tokens", "granted_prefill_tokens", "granted_requests", "draining", "step_time")
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRANTED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRANTED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_FIELD_NUMBER: _ClassVar[int]
    free_blocks: int
    total_blocks: int
    running: int
    waiting: int
    waiting_prefill_tokens: int
    granted_prefill_tokens: int
    granted_requests: int
    draining: bool
    step_time: StepTime
    def __init__(self, free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., granted_prefill_tokens: _Optional[int] = ..., granted_requests: _Optional[int] = ..., draining: _Optional[bool] = ..., step_time: _Optional[_Union[StepTime, _Mapping]] = ...) -> None: ...

class StepTime(_message.Message):
    __slots__ = ("base", "per_row", "per_prompt_token", "per_context_token")
    BASE_FIELD_NUMBER: _ClassVar[int]
    PER_ROW_FIELD_NUMBER: _ClassVar[int]
    PER_PROMPT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PER_CONTEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    base: float
    per_row: float
    per_prompt_token: float
    per_context_token: float
    def __init__(self, base: _Optional[float] = ..., per_row: _Optional[float] = ..., per_prompt_token: _Optional[float] = ..., per_context_token: _Optional[float] = ...) -> None: ...
