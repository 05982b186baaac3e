"""`python -m bench.speculation`: streams with and without speculation, in turns, on texts that repeat more or less.

Each prompt is answered by an engine without guesses and by one with `--speculation auto`, which must say the same. What
is told is CPU time per token once all streams have their first one, and steps. CPU time is the engines' clock as well,
so that what guesses cost is not put down to neighbours on the machine; it says what a clock would on a machine without
any.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

_CACHE_BYTES = 1 << 29
"""Bytes of keys and values for each sixteen streams."""
_CHANGED_EVERY = 25
_QUESTIONS = {
    "chat": (
        "What is the capital of France and what is it known for?",
        "Explain how a bicycle stays upright.",
        "Who was Marie Curie?",
    ),
    "code": (
        "Write a Python function that returns the n-th Fibonacci number, with a docstring and tests.",
        "Write a Python class for a bank account with deposit, withdraw and balance.",
        "Write HTML for a page with a table of five planets and their diameters.",
    ),
}
_EDIT = "Repeat this text word by word, but write 'Alice' in upper case:\n\n"
_BOOK = Path(__file__).parent / "data" / "alice.txt"


@dataclass
class Sums:
    """Sums over prompts of a kind: tokens, steps, CPU seconds behind the first tokens, guesses, accepted guesses."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    guessed: int = 0
    accepted: int = 0


def answer(engine: Engine, requests: Sequence[EngineRequest], sums: Sums) -> list[list[int]]:
    """Return the tokens of each request's answer, and add what they took to the sums."""
    before, answers = engine.stats(), {request.key: list[int]() for request in requests}
    started, num_before = 0.0, 0
    for request in requests:
        engine.add(request)
    while engine.has_unfinished():
        result = engine.step()
        if result.error is not None:
            raise result.error
        for output in result.tokens:
            answers[output.key] += output.token_ids
        if not started and all(answers.values()):
            started, num_before = time.process_time(), sum(map(len, answers.values()))
    after = engine.stats()
    sums.seconds += time.process_time() - started
    sums.tokens += sum(map(len, answers.values())) - num_before
    sums.steps += after.steps - before.steps
    sums.guessed += after.draft_tokens - before.draft_tokens
    sums.accepted += after.accepted_tokens - before.accepted_tokens
    return list(answers.values())


def prompts_of(kind: str) -> Sequence[str]:
    """Return what is asked: for `edits` and `predictions` a text with changes, with a prediction for the latter."""
    if kind == "edits":
        paragraphs = [text.replace("\n", " ") for text in _BOOK.read_text(encoding="utf-8").split("\n\n")]
        return [_EDIT + text for text in paragraphs if 350 < len(text) < 700][:3]
    return _QUESTIONS["code" if kind == "predictions" else kind]


def main(
    model: Annotated[str, typer.Option(help="A name of the model store, or a path.")] = "smollm2-135m-instruct",
    quantization: Annotated[str, typer.Option(help="Form of the weights.")] = "auto",
    kinds: Annotated[str, typer.Option(help="Comma-separated.")] = "predictions,edits,code,chat",
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens per answer.")] = 100,
    threads: Annotated[int, typer.Option(min=0, help="0: what the executor would choose.")] = 1,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once, each with a prompt of its own.")] = 1,
) -> None:
    """Print a table. Fails if an answer differs."""
    path = resolve(model, ExecutorSettings().home)
    encode = load_model_tokenizer(path).tokenizer.encode
    engines = {
        speculation: build_engine(
            ExecutorSettings(
                model=str(path),
                quantization=quantization,  # type: ignore[arg-type]
                num_threads=threads,
                kv_cache_memory=_CACHE_BYTES * -(-streams // 16),  # type: ignore[arg-type]
                max_num_seqs=streams if streams > 1 else None,
                prefix_cache=False,
                speculation=speculation,
            ),
            lambda line: print(line, file=sys.stderr),
            clock=time.process_time,
        ).engine
        for speculation in ("off", "auto")
    }
    sampling = SamplingParams(max_tokens=tokens, temperature=temperature, seed=1)

    def prompt_ids(question: str, place: int) -> list[int]:
        asked = f"{place}. {question}" if place else question
        chat = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        return encode(chat, add_special_tokens=False).ids

    def changed(answer: Sequence[int]) -> list[int]:
        return [0 if place % _CHANGED_EVERY == 0 else token_id for place, token_id in enumerate(answer, 1)]

    print("| text | tokens | steps without, with | guessed, right | CPU ms per token without, with | ratio |")
    print(f"|{'---|' * 6}")
    for kind in kinds.split(","):
        plain, guessing = Sums(), Sums()
        for number, question in enumerate(prompts_of(kind)):
            requests = [
                EngineRequest((0, place), f"{kind}{number}", tuple(prompt_ids(question, place)), sampling)
                for place in range(streams)
            ]
            expected = answer(engines["off"], requests, plain)
            again = [
                replace(
                    request,
                    cache_salt=f"{kind}{number}/{place}".encode(),
                    prediction_token_ids=tuple(changed(tokens)) if kind == "predictions" else (),
                )
                for place, (request, tokens) in enumerate(zip(requests, expected, strict=True))
            ]
            if answer(engines["auto"], again, guessing) != expected:
                raise SystemExit(f"{kind}: another answer to {question!r}")
        without, with_guesses = (1e3 * sums.seconds / sums.tokens for sums in (plain, guessing))
        print(
            f"| {kind} | {plain.tokens} | {plain.steps}, {guessing.steps} | {guessing.guessed}, {guessing.accepted} | "
            f"{without:.1f}, {with_guesses:.1f} | {without / with_guesses:.2f} |",
            flush=True,
        )
    os._exit(0)  # as the engine's own process ends


if __name__ == "__main__":
    typer.run(main)
