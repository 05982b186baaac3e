"""`python -m bench.decode`: decode throughput of the engine alone with each form of the weights, in turns.

The forms are measured one after the other, again and again, so that a neighbour's load falls on all of them; what is
reported is the median of the rounds, and of their ratios to the first form.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from typing import Annotated

import typer

from bench.quality import FORMS, form_settings
from scalellm.services.common.model_store import resolve
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams

_PROMPT_LEN = 128
_KV_CACHE_BYTES = 1 << 30  # room for all sequences at once, in float32
_MEASURED = ",".join(name for name in FORMS if name != "bfloat16")


def decode_rate(engine: Engine, num_seqs: int, num_tokens: int) -> float:
    """Return tokens per second from the step on after which every one of `num_seqs` sequences has begun to answer."""
    draw = random.Random(0)
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for number in range(num_seqs):
        prompt = tuple(draw.randrange(engine.config.vocab_size) for _ in range(_PROMPT_LEN))
        engine.add(EngineRequest((0, number), str(number), prompt, sampling))
    waiting = set(range(num_seqs))
    started, count = 0.0, 0
    while engine.has_unfinished():
        result = engine.step()
        if result.error is not None:
            raise result.error
        if not waiting:
            count += sum(len(tokens.token_ids) for tokens in result.tokens)
            continue
        waiting -= {tokens.key[1] for tokens in result.tokens}
        started = time.perf_counter()
    return count / (time.perf_counter() - started)


def main(
    model: Annotated[str, typer.Option(help="A name of the model store, or a path.")] = "smollm2-135m-instruct",
    forms: Annotated[str, typer.Option(help="Comma-separated.")] = _MEASURED,
    sequences: Annotated[str, typer.Option(help="Numbers of sequences at once, comma-separated.")] = "1,8,64",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0: what the executor would choose.")] = 0,
) -> None:
    """Print a table: tokens per second, and in brackets the ratio to the first form."""
    path = resolve(model, ExecutorSettings().home)
    names = forms.split(",")
    engines = {}
    for form in names:
        settings = form_settings(str(path), form).model_copy(
            # Random prompts lead to answers that repeat themselves: guesses would be measured, not forms.
            update={"num_threads": threads, "kv_cache_memory": _KV_CACHE_BYTES, "speculation": "off"}
        )
        engines[form] = build_engine(settings, lambda line: print(line, file=sys.stderr)).engine
    print(f"| sequences | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for num_seqs in map(int, sequences.split(",")):
        rates: dict[str, list[float]] = {form: [] for form in names}
        for _ in range(rounds):
            for form, engine in engines.items():
                rates[form].append(decode_rate(engine, num_seqs, tokens))
        cells = []
        for form in names:
            ratio = statistics.median(a / b for a, b in zip(rates[form], rates[names[0]], strict=True))
            cells.append(f"{statistics.median(rates[form]):.1f} ({ratio:.2f})")
        print(f"| {num_seqs} | {' | '.join(cells)} |", flush=True)
    os._exit(0)  # as the engine's own process ends


if __name__ == "__main__":
    typer.run(main)
