"""Batches that are computed from their prompts to their longest answer, of a fake library."""

from __future__ import annotations

from bench.peers.servers.closed_batches import ClosedBatches
from bench.peers.servers.stepping import Job, Output

END = 7


class FakeBatch:
    """Counts up from each prompt's last token."""

    def __init__(self, prompts, num_steps):
        self.prompts = [list(prompt) for prompt in prompts]
        self.num_steps = num_steps
        self.steps = 0

    def step(self):
        self.steps += 1
        assert self.steps <= self.num_steps
        return [prompt[-1] + self.steps for prompt in self.prompts]


class Batches(ClosedBatches):
    """Keeps the fake batches, oldest first; the clock is set by hand."""

    def __init__(self, max_rows=32, gather_s=0.0):
        self.begun: list[FakeBatch] = []
        self.now = 0.0
        super().__init__(self._begun, max_rows, {END}, gather_s=gather_s, clock=lambda: self.now)

    def _begun(self, prompts, num_steps):
        self.begun.append(FakeBatch(prompts, num_steps))
        return self.begun[-1]


def ran(batches: Batches) -> dict[int, list[int]]:
    """Step to the end; the tokens of each job. Each job has to end once, with its last output."""
    tokens: dict[int, list[int]] = {}
    over: set[int] = set()
    while batches.has_work():
        for output in batches.step():
            assert output.number not in over
            tokens.setdefault(output.number, []).extend(output.token_ids)
            if output.is_last:
                over.add(output.number)
    assert over == set(tokens)
    return tokens


def test_a_batch_is_computed_to_its_end_before_the_next_is_begun():
    batches = Batches(max_rows=2)
    for number, max_tokens in enumerate((1, 3, 2)):
        batches.add(Job(number, [0, 10 * number], max_tokens, True))
    assert ran(batches) == {0: [1], 1: [11, 12, 13], 2: [21, 22]}
    assert [(batch.prompts, batch.steps) for batch in batches.begun] == [([[0, 0], [0, 10]], 3), ([[0, 20]], 2)]


def test_end_tokens_end_answers_that_do_not_ignore_them():
    batches = Batches()
    batches.add(Job(0, [END - 2], 4, True))
    batches.add(Job(1, [END - 2], 4, False))
    assert ran(batches) == {0: [6, 7, 8, 9], 1: [6]}


def test_jobs_that_come_at_once_are_computed_at_once():
    batches = Batches(max_rows=2, gather_s=1.0)
    batches.add(Job(0, [0], 1, True))
    assert (batches.step(), batches.begun) == ([], [])
    batches.now = 0.9
    batches.add(Job(1, [10], 1, True))
    # Full: nobody is waited for.
    assert batches.step() == [Output(0, [1], True), Output(1, [11], True)]
    batches.add(Job(2, [20], 1, True))
    batches.now = 1.8
    assert batches.step() == []
    batches.now = 2.0
    assert batches.step() == [Output(2, [21], True)]
    assert not batches.has_work()


def test_what_is_cancelled_is_not_told_and_a_batch_of_nothing_else_is_dropped():
    batches = Batches(max_rows=2)
    for number in range(3):
        batches.add(Job(number, [10 * number], 2, True))
    batches.step()
    batches.cancel(0)
    assert batches.step() == [Output(1, [12], True)]
    assert batches.step() == [Output(2, [21], False)]
    batches.cancel(2)
    batches.cancel(2)
    assert not batches.has_work()
    batches.add(Job(3, [30], 1, True))
    assert ran(batches) == {3: [31]}
    assert [len(batch.prompts) for batch in batches.begun] == [2, 1, 1]
