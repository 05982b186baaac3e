"""The engine core: continuous batching, paged KV cache and sampling over a model runner. No RPC in here."""

from scalellm.services.executor.engine.batch import (
    CompletedStep,
    DeviceLostError,
    Logprobs,
    ModelRunnerProtocol,
    PendingStep,
    SampledBatch,
    ScheduledBatch,
    ScheduledSequence,
)
from scalellm.services.executor.engine.books import EngineLoad, EngineStats, LinkCredits
from scalellm.services.executor.engine.config import CapacityPolicy, EngineConfig, EngineConfigError
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS, FakeModelRunner
from scalellm.services.executor.engine.grammar import Compilation, GrammarCompiler, GrammarError, Matcher
from scalellm.services.executor.engine.kv_cache_size import KVCacheTooSmallError, num_kv_blocks
from scalellm.services.executor.engine.request import (
    AbortReason,
    EngineRequest,
    FinishReason,
    RequestFinish,
    RequestKey,
    RequestStatus,
    ResumedSample,
    SampleFinish,
    SupersededError,
    Timings,
    TokenLogprobs,
    TokenOutput,
    Usage,
)
from scalellm.services.executor.engine.sampling_params import InvalidRequestError, SamplingParams
from scalellm.services.executor.engine.step_result import LinkResult, StepResult
from scalellm.services.executor.engine.step_time import StepTimeModel
from scalellm.services.executor.engine.swap import SwapCost

__all__ = [
    "STEP_TIME_PRESETS",
    "AbortReason",
    "CapacityPolicy",
    "Compilation",
    "CompletedStep",
    "DeviceLostError",
    "Engine",
    "EngineConfig",
    "EngineConfigError",
    "EngineLoad",
    "EngineRequest",
    "EngineStats",
    "FakeModelRunner",
    "FinishReason",
    "GrammarCompiler",
    "GrammarError",
    "InvalidRequestError",
    "KVCacheTooSmallError",
    "LinkCredits",
    "LinkResult",
    "Logprobs",
    "Matcher",
    "ModelRunnerProtocol",
    "PendingStep",
    "RequestFinish",
    "RequestKey",
    "RequestStatus",
    "ResumedSample",
    "SampleFinish",
    "SampledBatch",
    "SamplingParams",
    "ScheduledBatch",
    "ScheduledSequence",
    "StepResult",
    "StepTimeModel",
    "SupersededError",
    "SwapCost",
    "Timings",
    "TokenLogprobs",
    "TokenOutput",
    "Usage",
    "num_kv_blocks",
]
