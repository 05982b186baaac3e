"""`python -m bench.quality`: the perplexity of a model in every form of its weights, on the same text.

The text is chapters I and II of Lewis Carroll's "Alice's Adventures in Wonderland" (1865, in the public domain) in the
"Millennium Fulcrum Edition 2.9", as the Canterbury corpus has it (alice29.txt). It is cut into windows of equal length;
all tokens of a window but its first are scored, by the engine's prompt_logprobs.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from scalellm.services.common.model_store import resolve
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.tokenizer.text.loading import load_model_tokenizer

TEXT = Path(__file__).parent / "data" / "alice.txt"
FORMS = ("float32", "bfloat16", "int8", "int4", "keep")


def form_settings(model: str, form: str) -> ExecutorSettings:
    """Return the settings of a model on the CPU in one of `FORMS`; what is quantised computes in float32."""
    is_dtype = form in ("float32", "bfloat16")
    return ExecutorSettings.model_validate(
        {
            "model": model,
            "device": "cpu",
            "dtype": form if is_dtype else "float32",
            "quantization": "none" if is_dtype else form,
            "kv_cache_memory": "256MiB",
            "prefix_cache": False,
        }
    )


def mean_negative_logprob(engine: Engine, token_ids: list[int], window: int) -> float:
    """Return the mean of -log p, in nats, over the tokens of all whole windows, without the first of each."""
    windows = [token_ids[start : start + window] for start in range(0, len(token_ids) - window + 1, window)]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    for number, tokens in enumerate(windows):
        engine.add(EngineRequest((0, number), str(number), tuple(tokens), sampling))
    total, count = 0.0, 0
    while engine.has_unfinished():
        result = engine.step()
        if result.error is not None:
            raise result.error
        for scores in result.prompt_logprobs:
            logprobs = scores.logprobs[1:] if scores.offset == 0 else scores.logprobs
            total -= sum(logprobs)
            count += len(logprobs)
    if count != len(windows) * (window - 1):
        raise RuntimeError(f"{count} tokens were scored, not {len(windows)} x {window - 1}")
    return total / count


def main(
    model: Annotated[str, typer.Option(help="A name of the model store, or a path.")] = "smollm2-135m-instruct",
    forms: Annotated[str, typer.Option(help="Comma-separated; the first is what the others are compared with.")] = (
        ",".join(FORMS)
    ),
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
) -> None:
    """Print a table: perplexity, its ratio to that of the first form, and seconds."""
    path = resolve(model, ExecutorSettings().home)
    tokens = load_model_tokenizer(path).tokenizer.encode(TEXT.read_text()).ids
    print(f"{model}: {len(tokens)} tokens of {TEXT.name}, windows of {window}\n")
    print("| weights | perplexity | ratio | s |\n|---|---|---|---|")
    first: float | None = None
    for form in forms.split(","):
        engine = build_engine(form_settings(str(path), form), lambda line: print(line, file=sys.stderr)).engine
        started = time.perf_counter()
        loss = mean_negative_logprob(engine, tokens, window)
        first = loss if first is None else first
        seconds = time.perf_counter() - started
        print(f"| {form} | {math.exp(loss):.4f} | {math.exp(loss - first):.4f} | {seconds:.1f} |", flush=True)
        del engine
    sys.stdout.flush()
    os._exit(0)  # as the engine's own process ends: nothing waits for threads that sleep


if __name__ == "__main__":
    typer.run(main)
