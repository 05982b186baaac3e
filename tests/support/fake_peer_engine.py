"""A fake engine for `bench.peers.servers`: one token per job and step, no model."""

from __future__ import annotations

from bench.peers.servers.stepping import Job, Output

COUNT_JOBS, FAIL = 98, 99


class FakePeerEngine:
    """Counts up from a prompt's last token; after COUNT_JOBS it gives the number of its jobs, at FAIL it fails."""

    def __init__(self) -> None:
        self._jobs: dict[int, tuple[int, int]] = {}

    def add(self, job: Job) -> None:
        self._jobs[job.number] = (job.prompt[-1], job.max_tokens)

    def cancel(self, number: int) -> None:
        self._jobs.pop(number, None)

    def has_work(self) -> bool:
        return bool(self._jobs)

    def step(self) -> list[Output]:
        if any(last == FAIL for last, _ in self._jobs.values()):
            raise RuntimeError("a step that fails, as it was asked to")
        outputs = []
        for number, (last, left) in list(self._jobs.items()):
            token_id = len(self._jobs) if last == COUNT_JOBS else (last + 1) % COUNT_JOBS
            outputs.append(Output(number, [token_id], left == 1))
            self._jobs[number] = (token_id, left - 1)
        for output in outputs:
            if output.is_last:
                del self._jobs[output.number]
        return outputs
