"""Builds the engine from its settings: model, KV cache, limits. Each StartError is one line that says what to
change."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.model_store import ModelStoreError, name_of, resolve
from scalellm.services.common.tokenizer_digest import TokenizerSourceError, tokenizer_sha256
from scalellm.services.common.vocabulary import VocabularyError, read_vocabulary
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.config import EngineConfigError
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS, FakeModelRunner
from scalellm.services.executor.engine.grammar import GrammarCompiler
from scalellm.services.executor.engine.kv_cache_size import KVCacheTooSmallError
from scalellm.services.executor.engine.step_warm_up import fit_step_times
from scalellm.services.executor.engine_load import welcome
from scalellm.services.executor.ipc import EngineChannel
from scalellm.services.executor.late_grammars import LateGrammars
from scalellm.services.executor.limits import choose_limits, engine_config, output_interval
from scalellm.services.executor.model_config import PRESETS, ModelConfig, UnsupportedModelError
from scalellm.services.executor.model_config.files import read_shape
from scalellm.v1 import executor_pb2, link_pb2

if TYPE_CHECKING:
    from scalellm.services.executor.weight_form import WeightForm

_log = logging.getLogger(__name__)

_FAKE_BLOCKS = 4096


@dataclass(frozen=True)
class _FoundModel:
    """A model before it is loaded; `path` is None for a preset, which has shapes only."""

    path: Path | None
    name: str
    config: ModelConfig
    tokenizer_sha256: bytes


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that is ready to serve, with its Welcome and the facts about its model."""

    engine: Engine
    welcome: link_pb2.Welcome
    info: executor_pb2.GetExecutorInfoResponse
    late_compiles: Callable[[], int] = lambda: 0
    """Kernel variants compiled after warm-up so far."""
    output_interval: float = 0.0
    """Seconds; see PacedOutput."""


def build_engine(
    settings: ExecutorSettings,
    progress: Callable[[str], None],
    channels: Sequence[EngineChannel] = (),
    *,
    clock: Callable[[], float] = time.monotonic,
) -> LoadedEngine:
    """Load the model and make its engine.

    Args:
        settings: Settings of the executor.
        progress: Gets a line of text per stage.
        channels: Connections to the other ranks, each of which runs `follow_engine`.
        clock: The engine's clock, in seconds.

    Raises:
        StartError: The model or the settings cannot be served.
    """
    with _refusals():
        if settings.engine == "fake":
            return _fake_engine(settings, clock)
        return _model_engine(settings, progress, channels, clock)


def follow_engine(settings: ExecutorSettings, rank: int, channel: EngineChannel) -> None:
    """Load this rank's share of the model, for a rank other than 0, and run the steps that rank 0 sends. Never returns.

    Raises:
        StartError: The model or the settings cannot be served.
        EOFError: Rank 0 has ended.
        Exception: Whatever a step raised.
    """
    from scalellm.services.executor.model_engine import follow_model_engine
    from scalellm.services.executor.placement import choose_placement
    from scalellm.services.executor.ranks.group import join, plans_from
    from scalellm.services.executor.weights import read_model_config

    with _refusals():
        found = _find_model(settings, read_model_config)
        placement = choose_placement(settings, found.config, rank)
        plans = plans_from(channel)
        device = placement.device.torch_device
        shard = join(plans, rank, settings.num_ranks, settings.expert_parallel, device)
        follow_model_engine(settings, placement, _weights_at(settings, found), found.config, shard, plans)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn the errors by which parts refuse a model or settings into a StartError."""
    try:
        yield
    except (
        ModelStoreError,
        UnsupportedModelError,
        TokenizerSourceError,
        KVCacheTooSmallError,
        EngineConfigError,
    ) as error:
        raise StartError(str(error)) from error


def _weights_at(settings: ExecutorSettings, model: _FoundModel) -> Path | None:
    """Return the path of the weights; None: random ones are used."""
    return None if settings.load_format == "dummy" else model.path


def _model_engine(
    settings: ExecutorSettings,
    progress: Callable[[str], None],
    channels: Sequence[EngineChannel],
    clock: Callable[[], float],
) -> LoadedEngine:
    # Imported here, because torch takes three seconds to load and the fake engine does without it.
    from scalellm.services.executor.model_engine import build_model_engine
    from scalellm.services.executor.models.runtime import dtype_name
    from scalellm.services.executor.models.shard import Shard
    from scalellm.services.executor.placement import choose_placement
    from scalellm.services.executor.weights import read_model_config

    found = _find_model(settings, read_model_config)
    placement = choose_placement(settings, found.config)
    shard = tell = None
    if settings.num_ranks > 1:
        from scalellm.services.executor.ranks.group import Followers

        Shard(0, settings.num_ranks, settings.expert_parallel).check(found.config)
        followers = Followers(channels)
        shard, tell = followers.meet(settings.expert_parallel, placement.device.torch_device), followers.tell
    weights = _weights_at(settings, found)
    built = build_model_engine(
        settings, placement, weights, found.config, progress, _grammars(found), clock, shard, tell
    )
    library = built.ops.library
    info = executor_pb2.GetExecutorInfoResponse(
        device=placement.device.torch_device.type,
        dtype=dtype_name(placement.dtype),
        kv_cache_dtype=dtype_name(placement.kv_cache_dtype),
        backend=next((backend for backend in built.ops.backends.values() if backend != "torch"), "torch"),
        quantization=built.form.type if built.form.type != dtype_name(placement.dtype) else "",
        weights=_weights(built.form),
        other_weights=None if built.other_form is None else _weights(built.other_form),
        kernels=dict(built.ops.backends),
        instructions="" if library is None else library.level,
        unused_instructions={} if library is None else library.passed_over,
    )
    return replace(
        _describe(settings, found, built.engine, info),
        late_compiles=lambda: len(built.runner.late_compiles),
        output_interval=output_interval(settings, on_gpu=placement.device.torch_device.type != "cpu"),
    )


def _weights(form: WeightForm) -> executor_pb2.WeightForm:
    return executor_pb2.WeightForm(quantization=form.quantization, type=form.type, bytes=form.num_bytes)


def _grammars(model: _FoundModel) -> GrammarCompiler | None:
    """Return the compiler of grammars, or None if the model's vocabulary or end tokens are not known."""
    from scalellm.services.executor.grammar import LlGrammarCompiler

    if model.path is None or not model.config.eos_token_ids:
        return None
    try:
        vocabulary = read_vocabulary(model.path, model.config.vocab_size)
    except VocabularyError as error:
        _log.warning("answers cannot be given a shape (structured_output): %s", error)
        return None
    return LlGrammarCompiler(vocabulary, model.config.eos_token_ids)


def _fake_engine(settings: ExecutorSettings, clock: Callable[[], float]) -> LoadedEngine:
    found, limits = _find_model(settings, read_shape), choose_limits(settings, on_gpu=False)
    model, step_time = found.config, STEP_TIME_PRESETS[settings.fake_preset]
    max_model_len = settings.max_model_len or model.max_position_embeddings
    num_blocks = settings.num_blocks or max(_FAKE_BLOCKS, -(-max_model_len // limits.block_size))
    # A modelled GPU overlaps its steps, as a real one does.
    overlaps = settings.fake_preset != "instant"
    config = engine_config(settings, limits, model, num_blocks, max_model_len)
    grammars = None
    if found.path is not None and model.eos_token_ids:
        grammars = LateGrammars(found.path, config.max_num_seqs, model.vocab_size, model.eos_token_ids)
    runner = FakeModelRunner(model.vocab_size, model.eos_token_ids, step_time, overlaps=overlaps, masks=grammars)
    # A modelled device answers as fast as a real one.
    step_times = fit_step_times(config, runner) if overlaps else None
    engine = Engine(config, runner, clock, grammars=grammars, step_times=step_times)
    info = executor_pb2.GetExecutorInfoResponse(device="cpu", backend="fake")
    return replace(
        _describe(settings, found, engine, info),
        output_interval=output_interval(settings, on_gpu=True),  # as if it had cores of its own
    )


def _find_model(settings: ExecutorSettings, read: Callable[[Path], ModelConfig]) -> _FoundModel:
    if settings.load_format == "dummy" and settings.model in PRESETS:
        # Without a tokenizer text cannot be served, but token ids can.
        return _FoundModel(None, settings.model_name or settings.model, PRESETS[settings.model], b"")
    path = resolve(settings.model, settings.home)
    name = settings.model_name or name_of(settings.model)
    config = read(path)
    if settings.load_format == "dummy":
        config = replace(config, stored_linears=None)  # random weights do not follow the checkpoint's form
    return _FoundModel(path, name, config, tokenizer_sha256(path))


def _describe(
    settings: ExecutorSettings, model: _FoundModel, engine: Engine, info: executor_pb2.GetExecutorInfoResponse
) -> LoadedEngine:
    config = engine.config
    info.instance_id = uuid.uuid4().hex
    info.model = model.name
    info.architecture = model.config.architecture
    info.block_size = config.block_size
    info.max_model_len = config.max_model_len
    info.max_num_seqs = config.max_num_seqs
    info.tensor_parallel = settings.tensor_parallel
    info.expert_parallel = settings.expert_parallel
    greeting = welcome(
        engine,
        instance_id=info.instance_id,
        model=model.name,
        tokenizer_sha256=model.tokenizer_sha256,
        tensor_parallel=settings.tensor_parallel,
    )
    return LoadedEngine(engine, greeting, info)
