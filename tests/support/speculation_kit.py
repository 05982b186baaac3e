"""Drafters that are right, wrong or neither, and a budget that takes whatever they guess."""

import random
from collections.abc import Callable

from engine_kit import VOCAB, undisturbed
from scalellm.services.executor.engine import EngineRequest
from scalellm.services.executor.engine.batch import ScheduledBatch
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup
from scalellm.services.executor.engine.speculation import Draft, Drafter, Speculator, SuffixDrafter

Oracle = Callable[[EngineRequest, int], list[int]]
"""The whole output of a sample."""


class ScriptedDrafter:
    """Guesses what a function of the sample and the next position says, token by token."""

    def __init__(self, guess: Callable[[Sequence, int], int | None]) -> None:
        self._guess = guess
        self.ended: list[SequenceGroup] = []

    def draft(self, seq: Sequence, most: int) -> Draft | None:
        token_ids: list[int] = []
        for position in range(len(seq.token_ids), len(seq.token_ids) + most):
            if (token_id := self._guess(seq, position)) is None:
                break
            token_ids.append(token_id)
        return Draft(token_ids, 5) if token_ids else None

    def end(self, group: SequenceGroup) -> None:
        self.ended.append(group)


def right(oracle: Oracle, vocab_size: int, shift: int = 0) -> ScriptedDrafter:
    """Guesses what comes; with a shift, always something else."""

    def guess(seq: Sequence, position: int) -> int | None:
        place = position - seq.group.num_prompt_tokens
        output = oracle(seq.group.request, seq.index)
        return (output[place] + shift) % vocab_size if place < len(output) else None

    return ScriptedDrafter(guess)


def sometimes_right(oracle: Oracle, vocab_size: int, seed: int) -> ScriptedDrafter:
    """Guesses right half of the time, and else anything, in drafts of any length."""
    rng = random.Random(seed)

    def guess(seq: Sequence, position: int) -> int | None:
        place = position - seq.group.num_prompt_tokens
        output = oracle(seq.group.request, seq.index)
        if rng.random() < 0.1:
            return None
        return output[place] if rng.random() < 0.6 and place < len(output) else rng.randrange(vocab_size)

    return ScriptedDrafter(guess)


def make_drafter(kind: str, oracle: Oracle, vocab_size: int = VOCAB, seed: int = 0) -> Drafter:
    match kind:
        case "suffix":
            return SuffixDrafter()
        case "right":
            return right(oracle, vocab_size)
        case "wrong":
            return right(oracle, vocab_size, shift=1)
        case "random":
            return sometimes_right(oracle, vocab_size, seed)
        case other:
            raise ValueError(other)


DRAFTERS = ("suffix", "right", "wrong", "random")


class TakesAll:
    """A budget that takes all that there is room for, each sequence's in turn."""

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Learn nothing."""

    def room(self, batch: ScheduledBatch) -> int:
        return 1 << 20

    def divide(self, batch: ScheduledBatch, chances: list[list[float]], room: int) -> list[int]:
        counts = []
        for of_sequence in chances:
            counts.append(min(room, len(of_sequence)))
            room -= counts[-1]
        return counts


def make_speculator(
    kind: str, *, max_model_len: int = 64, seed: int = 0, oracle: Oracle | None = None, vocab_size: int = VOCAB
) -> Speculator:
    """A drafter of a kind with all the rows that it wants; `oracle` defaults to that of the paged fake runner."""
    known: dict[tuple[object, int], list[int]] = {}

    def output(request: EngineRequest, index: int) -> list[int]:
        if (request.key, index) not in known:
            known[request.key, index] = undisturbed(request, index, max_model_len)[0]
        return known[request.key, index]

    return Speculator(make_drafter(kind, oracle or output, vocab_size, seed), TakesAll())
