"""Measurement of step times before serving, with made-up requests."""

import time
from collections.abc import Callable
from dataclasses import replace

from scalellm.services.executor.engine.batch import ModelRunnerProtocol
from scalellm.services.executor.engine.config import CapacityPolicy, EngineConfig
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.executor.engine.step_time import StepTimeFit

_ROWS = (1, 8, 64)
_PROMPT_LENS = (64, 512)
_OUTPUT_LEN = 24


def fit_step_times(
    config: EngineConfig, runner: ModelRunnerProtocol, clock: Callable[[], float] = time.monotonic
) -> StepTimeFit:
    """Measure steps with a temporary engine that serves requests of several lengths, few and many at once.

    Raises whatever a step raises. The cache content that is left over is never found by later requests.
    """
    fit = StepTimeFit()
    alone = replace(
        config,
        enable_prefix_cache=False,
        target_itl=None,
        capacity_policy=CapacityPolicy.MAX_UTILIZATION,
        num_host_blocks=0,
    )
    engine = Engine(alone, runner, clock, step_times=fit)
    sampling = SamplingParams(max_tokens=_OUTPUT_LEN, temperature=0.0, ignore_eos=True)
    room = config.num_blocks * config.block_size
    for num_rows in _ROWS:
        for prompt_len in _PROMPT_LENS:
            whole = prompt_len + _OUTPUT_LEN
            if num_rows > config.max_num_seqs or whole > config.max_model_len or num_rows * whole > room:
                continue
            for number in range(num_rows):
                engine.add(EngineRequest((0, number), str(number), (1,) * prompt_len, sampling))
            while engine.has_unfinished():
                if (error := engine.step().error) is not None:
                    raise error
    return fit
