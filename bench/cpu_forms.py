"""The CPU's forms of ops against each other: two engines on one workload, step by step in turn.

    python -m bench.cpu_forms                               # 128 tokens in, 128 out, at 1, 8 and 64 at once
    python -m bench.cpu_forms --concurrency 8 --output-len 32 --num-threads 1

Neighbours slow both engines of a pair of steps alike, so the median of the ratios is steadier than either time.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import dataclass, field

import torch

from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams


@dataclass
class Side:
    """One engine, and what its steps took: seconds of the clock, and of all threads of the process."""

    engine: Engine
    num_requests: int
    prefill: list[tuple[float, float]] = field(default_factory=list)
    decode: list[tuple[float, float]] = field(default_factory=list)

    def add(self, input_len: int, output_len: int) -> None:
        draw = random.Random(0)
        sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        for number in range(self.num_requests):
            prompt = tuple(draw.randrange(1000, self.engine.config.vocab_size) for _ in range(input_len))
            self.engine.add(EngineRequest((0, number), str(number), prompt, sampling))

    def step(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        result = self.engine.step()
        took = (time.perf_counter() - wall, time.process_time() - cpu)
        if result.error is not None:
            raise result.error
        (self.decode if self.prefill else self.prefill).append(took)


def compare(settings: dict[str, object], forms: list[str], num_requests: int, input_len: int, output_len: int) -> str:
    sides = []
    for form in forms:
        # All prompts in one step, so that every step after it is one of decodes alone.
        prompts = {"max_num_batched_tokens": num_requests * input_len + 1, "max_num_seqs": num_requests}
        chosen = ExecutorSettings.model_validate({**settings, **prompts, "kernels": f"all={form}"})
        sides.append(Side(build_engine(chosen, lambda _: None).engine, num_requests))
        sides[-1].add(input_len, output_len)
    while any(side.engine.has_unfinished() for side in sides):
        for side in sides:
            if side.engine.has_unfinished():
                side.step()
    cells = [f"{num_requests}"]
    for clock in (0, 1):
        cells += [f"{1e3 * statistics.median(took[clock] for took in side.decode):.1f}" for side in sides]
        pairs = zip(*(side.decode for side in sides), strict=False)
        cells.append(f"**{statistics.median(a[clock] / b[clock] for a, b in pairs):.2f}**")
    cells.append(f"{sides[0].prefill[0][1] / sides[1].prefill[0][1]:.2f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_forms", description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,8,64")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--forms", default="torch,cpp", help="two of them; ratios are first over second")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    args = parser.parse_args()
    forms = args.forms.split(",")
    settings: dict[str, object] = {
        "model": args.model,
        "num_threads": args.num_threads,
        "device": "cpu",
        "kv_cache_memory": "1GiB",
    }
    settings["target_itl_ms"] = None
    print(f"torch {torch.__version__}, {args.num_threads} threads; medians of decode steps, ms")
    print(f"| at once | {forms[0]} | {forms[1]} | ratio | CPU: {forms[0]} | {forms[1]} | ratio | prompts, CPU |")
    print("|---|---|---|---|---|---|---|---|")
    for num_requests in map(int, args.concurrency.split(",")):
        print(compare(settings, forms, num_requests, args.input_len, args.output_len), flush=True)


if __name__ == "__main__":
    main()
