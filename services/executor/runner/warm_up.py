"""Before serving: capture the decode steps, and reach every kernel variant that serving will."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from scalellm.services.executor.engine.config import CapacityPolicy, EngineConfig
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.grammar import GrammarCompiler
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.executor.engine.step_warm_up import fit_step_times
from scalellm.services.executor.models import CausalLM, ForwardContext, PrefillRows, allocate_kv_caches
from scalellm.services.executor.runner.device import Device
from scalellm.services.executor.runner.model_runner import ModelRunner

_LINK = 0
_GRAMMAR = "start: /(.|\\n){100}/"
_MANY_COPIES = 17  # of cache blocks at a time: more than the smaller variant of `copy_blocks_` takes


def warm_up(
    runner: ModelRunner,
    config: EngineConfig,
    on_progress: Callable[[str], None],
    grammars: GrammarCompiler | None = None,
) -> None:
    """Capture graphs, serve made-up requests through an engine of its own, and seal the launcher.

    Kernels are compiled per variant, by dtypes and by sizes that tile tables divide at powers of two. Prompts of all
    these lengths and every kind of sampling, alone and beside a decode, reach the variants of serving: whatever
    compiles after this is counted in `runner.late_compiles`. Leftover cache content is never found by later requests.
    """
    # First: a capture gives the memory that torch holds for reuse back, page-locked memory, too. What serving takes is
    # thus there after the requests.
    runner.capture_graphs(lambda done, total: on_progress(f"decode graphs {done}/{total}"))
    requests = list(_requests(config, has_grammars=grammars is not None))
    engine = Engine(
        replace(
            config,
            enable_prefix_cache=False,
            target_itl=None,
            capacity_policy=CapacityPolicy.MAX_UTILIZATION,
            num_host_blocks=0,
        ),
        runner,
        grammars=grammars,
    )

    def step() -> None:
        result = engine.step()
        if result.error is not None:
            raise result.error

    for number, request in enumerate(requests):
        engine.add(request)
        # Every second one meets the decodes of the one before it; the others have a step to themselves.
        while engine.has_unfinished() and (number % 2 or engine.load().waiting):
            step()
        on_progress(f"warm-up {100 * (number + 1) // (len(requests) + 1)} %")
    while engine.has_unfinished():
        step()
    for count in (1, _MANY_COPIES):
        if count < config.num_blocks:
            runner.copy_blocks([(0, target) for target in range(1, count + 1)])
    fit_step_times(config, runner)  # whose variants are reached by this; the times are taken later, without compiling
    runner.seal()


@torch.inference_mode()
def run_largest_step(model: CausalLM, config: EngineConfig, device: Device, kv_cache_dtype: torch.dtype) -> None:
    """Run a step of `max_num_batched_tokens` tokens that writes nothing, so that torch holds the memory it takes.

    `config.num_blocks` may still be anything: this serves to find out how many blocks there is room for.
    """
    T, page, where = config.max_num_batched_tokens, config.block_size, device.torch_device
    chunk = min(T, config.max_model_len)
    num_chunks = math.ceil(T / chunk)
    tokens = torch.zeros(T, dtype=torch.int64, device=where)
    starts = (torch.arange(num_chunks + 1, dtype=torch.int32, device=where) * chunk).clamp_(max=T)
    context = ForwardContext(
        positions=tokens,
        slot_mapping=torch.full_like(tokens, -1),
        decode=None,
        prefill=PrefillRows(
            cu_seqlens_q=starts,
            seq_lens=starts.diff(),
            block_table=torch.zeros((num_chunks, math.ceil(chunk / page)), dtype=torch.int32, device=where),
            max_seqlen_q=chunk,
        ),
    )
    caches = allocate_kv_caches(model.rank_config, 1, page, dtype=kv_cache_dtype, device=where, ops=model.runtime.ops)
    hidden = model.forward(tokens, context, caches)
    model.joined(model.compute_logits(hidden[: config.max_num_seqs]))
    device.synchronize()


def _requests(config: EngineConfig, *, has_grammars: bool) -> Iterator[EngineRequest]:
    longest = max(1, min(config.max_num_batched_tokens, config.max_model_len - 3))
    lengths = [2**power for power in range(longest.bit_length()) if 2**power <= longest]
    shaped: dict[str, object] = {
        "logit_bias": {0: 1.0},
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    }
    scored: dict[str, object] = {"logprobs": config.max_logprobs, "prompt_logprobs": config.max_logprobs}
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
        {"presence_penalty": 0.5},
        {"logit_bias": {0: 1.0}},
        {"logprobs": 0},
        scored,
        shaped,
        shaped | scored,
    ]
    plans = [(length, kinds[1]) for length in sorted({*lengths, longest})]
    plans += [(min(8, longest), kind) for kind in kinds]
    twice = (plan for plan in plans for _ in range(2))  # once alone, once beside another
    for number, (length, kind) in enumerate(twice):
        sampling = SamplingParams(max_tokens=3, ignore_eos=True, seed=number, **kind)  # type: ignore[arg-type]
        yield EngineRequest((_LINK, number), f"warm-up-{number}", (1,) * length, sampling)
    if has_grammars:
        for number, kind in enumerate((kinds[1], shaped | scored), start=2 * len(plans)):
            sampling = SamplingParams(max_tokens=3, seed=number, **kind)  # type: ignore[arg-type]
            yield EngineRequest((_LINK, number), f"warm-up-{number}", (1,), sampling, grammar=_GRAMMAR)
