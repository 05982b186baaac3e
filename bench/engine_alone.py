"""The engine in a process of its own, called in process: what the whole line is measured against.

Run by `python -m bench`, one process per run: reads a JSON object (settings, workload) and writes one (traces).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

from bench.report import RequestTrace
from bench.workload import Workload
from services.executor.build import build_engine
from services.executor.config import ExecutorSettings
from services.executor.engine.engine import Engine
from services.executor.engine.request import EngineRequest
from services.executor.engine.sampling_params import SamplingParams


def run_engine(engine: Engine, workload: Workload) -> tuple[float, list[RequestTrace]]:
    """Keep `concurrency` requests in the engine until all are answered. Returns seconds and traces."""
    prompts = workload.prompts()
    sampling = SamplingParams(max_tokens=workload.output_len, temperature=0.0, ignore_eos=True)
    traces: list[RequestTrace] = []
    started = time.perf_counter()

    def send() -> None:
        traces.append(RequestTrace(time.perf_counter()))
        number = len(traces) - 1
        engine.add(EngineRequest((0, number), str(number), tuple(prompts[number]), sampling))

    for _ in range(min(workload.concurrency, workload.num_requests)):
        send()
    while engine.has_unfinished():
        result = engine.step()
        if result.error is not None:
            raise result.error
        now = time.perf_counter()
        for tokens in result.tokens:
            traces[tokens.key[1]].arrivals.append(now)
            traces[tokens.key[1]].counts.append(len(tokens.token_ids))
        for _ in result.finished:
            if len(traces) < workload.num_requests:
                send()
    return time.perf_counter() - started, traces


def main() -> None:
    """Warm up, run, write the outcome."""
    job: dict[str, Any] = json.load(sys.stdin)
    settings = ExecutorSettings.model_validate(job["settings"])
    engine = build_engine(settings, lambda _: None).engine
    warm_up = Workload(1, 1, 16, 4, engine.config.vocab_size, seed=1)
    run_engine(engine, warm_up)
    duration, traces = run_engine(engine, Workload(**job["workload"]))
    json.dump({"duration": duration, "traces": [asdict(trace) for trace in traces]}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
