from scalellm.v1 import link_pb2 as _link_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExecutorPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXECUTOR_PHASE_UNSPECIFIED: _ClassVar[ExecutorPhase]
    EXECUTOR_PHASE_CONNECTING: _ClassVar[ExecutorPhase]
    EXECUTOR_PHASE_READY: _ClassVar[ExecutorPhase]
    EXECUTOR_PHASE_DRAINING: _ClassVar[ExecutorPhase]
    EXECUTOR_PHASE_INCOMPATIBLE: _ClassVar[ExecutorPhase]
EXECUTOR_PHASE_UNSPECIFIED: ExecutorPhase
EXECUTOR_PHASE_CONNECTING: ExecutorPhase
EXECUTOR_PHASE_READY: ExecutorPhase
EXECUTOR_PHASE_DRAINING: ExecutorPhase
EXECUTOR_PHASE_INCOMPATIBLE: ExecutorPhase

class GetStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("instance_id", "queued", "queued_tokens", "running", "accepted", "finished", "cancelled", "rejected", "resubmitted", "executors", "draining", "redis_ok", "pools", "models", "clients")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    RESUBMITTED_FIELD_NUMBER: _ClassVar[int]
    EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    REDIS_OK_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    queued: int
    queued_tokens: int
    running: int
    accepted: int
    finished: int
    cancelled: int
    rejected: int
    resubmitted: int
    executors: _containers.RepeatedCompositeFieldContainer[ExecutorState]
    draining: bool
    redis_ok: bool
    pools: _containers.RepeatedCompositeFieldContainer[PoolState]
    models: _containers.RepeatedCompositeFieldContainer[ModelState]
    clients: _containers.RepeatedCompositeFieldContainer[ClientState]
    def __init__(self, instance_id: _Optional[str] = ..., queued: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., running: _Optional[int] = ..., accepted: _Optional[int] = ..., finished: _Optional[int] = ..., cancelled: _Optional[int] = ..., rejected: _Optional[int] = ..., resubmitted: _Optional[int] = ..., executors: _Optional[_Iterable[_Union[ExecutorState, _Mapping]]] = ..., draining: _Optional[bool] = ..., redis_ok: _Optional[bool] = ..., pools: _Optional[_Iterable[_Union[PoolState, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelState, _Mapping]]] = ..., clients: _Optional[_Iterable[_Union[ClientState, _Mapping]]] = ...) -> None: ...

class ClientState(_message.Message):
    __slots__ = ("service", "workers", "running")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    service: str
    workers: int
    running: int
    def __init__(self, service: _Optional[str] = ..., workers: _Optional[int] = ..., running: _Optional[int] = ...) -> None: ...

class ModelState(_message.Message):
    __slots__ = ("model", "queued", "queued_tokens", "running", "accepted", "finished", "cancelled", "rejected", "ready_executors")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    READY_EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    model: str
    queued: int
    queued_tokens: int
    running: int
    accepted: int
    finished: int
    cancelled: int
    rejected: int
    ready_executors: int
    def __init__(self, model: _Optional[str] = ..., queued: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., running: _Optional[int] = ..., accepted: _Optional[int] = ..., finished: _Optional[int] = ..., cancelled: _Optional[int] = ..., rejected: _Optional[int] = ..., ready_executors: _Optional[int] = ...) -> None: ...

class PoolState(_message.Message):
    __slots__ = ("tensor_parallel", "executors", "devices", "running", "chosen", "predicted_s", "reason", "model")
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    tensor_parallel: int
    executors: int
    devices: int
    running: int
    chosen: bool
    predicted_s: float
    reason: str
    model: str
    def __init__(self, tensor_parallel: _Optional[int] = ..., executors: _Optional[int] = ..., devices: _Optional[int] = ..., running: _Optional[int] = ..., chosen: _Optional[bool] = ..., predicted_s: _Optional[float] = ..., reason: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class ExecutorState(_message.Message):
    __slots__ = ("address", "instance_id", "phase", "load", "running", "last_error", "model", "credit_requests", "credit_tokens", "tensor_parallel", "tokens")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CREDIT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    address: str
    instance_id: str
    phase: ExecutorPhase
    load: _link_pb2.Load
    running: int
    last_error: str
    model: str
    credit_requests: int
    credit_tokens: int
    tensor_parallel: int
    tokens: int
    def __init__(self, address: _Optional[str] = ..., instance_id: _Optional[str] = ..., phase: _Optional[_Union[ExecutorPhase, str]] = ..., load: _Optional[_Union[_link_pb2.Load, _Mapping]] = ..., running: _Optional[int] = ..., last_error: _Optional[str] = ..., model: _Optional[str] = ..., credit_requests: _Optional[int] = ..., credit_tokens: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: int
    def __init__(self, timeout_s: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining",)
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    remaining: int
    def __init__(self, remaining: _Optional[int] = ...) -> None: ...

class AddExecutorRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class AddExecutorResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RemoveExecutorRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class RemoveExecutorResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
