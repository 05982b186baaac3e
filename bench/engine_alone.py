"""The engine in a process of its own, called in process: what the whole line is measured against.

Run by `python -m bench`, one process per run: reads a JSON object (settings, shape, load) and writes the records.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from bench.load.records import Ended, RequestRecord
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Conversation, Shape, conversations
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams


def run_engine(engine: Engine, planned: list[Conversation], concurrency: int) -> list[RequestRecord]:
    """Keep `concurrency` requests in the engine until all are answered."""
    records: list[RequestRecord] = []
    start = time.perf_counter()

    def send() -> None:
        number = len(records)
        turn = planned[number].turns[0]
        now = time.perf_counter() - start
        records.append(RequestRecord(number, 0, len(turn.token_ids), turn.output_len, due=now, sent=now))
        sampling = SamplingParams(max_tokens=turn.output_len, temperature=0.0, ignore_eos=True)
        engine.add(EngineRequest((0, number), str(number), turn.token_ids, sampling))

    for _ in range(min(concurrency, len(planned))):
        send()
    while engine.has_unfinished():
        result = engine.step()
        if result.error is not None:
            raise result.error
        now = time.perf_counter() - start
        for tokens in result.tokens:
            record = records[tokens.key[1]]
            record.arrivals.append(now)
            record.counts.append(len(tokens.token_ids))
        for finished in result.finished:
            record = records[finished.key[1]]
            record.ended = now
            record.server = Ended(record.input_len, sum(record.counts))
            if len(records) < len(planned):
                send()
    return records


def main() -> None:
    """Warm up, run, write the outcome."""
    job: dict[str, Any] = json.load(sys.stdin)
    settings = ExecutorSettings.model_validate(job["settings"])
    engine = build_engine(settings, lambda _: None).engine
    alphabet = Vocabulary.of_size(engine.config.vocab_size).alphabet
    run_engine(engine, conversations(Shape(input_len=16, output_len=4), alphabet, 1, "warm-up"), 1)
    planned = conversations(Shape(**job["shape"]), alphabet, job["num_requests"], job["seed"])
    records = run_engine(engine, planned, job["concurrency"])
    json.dump([record.as_json() for record in records], sys.stdout)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
