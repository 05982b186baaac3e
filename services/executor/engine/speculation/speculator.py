"""Drafts in steps: they are added as rows, and accepted or learned from afterwards."""

from dataclasses import dataclass
from typing import Protocol

from scalellm.services.executor.engine.batch import ScheduledBatch, ScheduledSequence
from scalellm.services.executor.engine.block_manager import BlockManager
from scalellm.services.executor.engine.sequence import Sequence, SequenceGroup
from scalellm.services.executor.engine.speculation.drafter import Draft, Drafter
from scalellm.services.executor.engine.speculation.survival import Survival

_LONGEST_DRAFT = 15


class Budget(Protocol):
    """Decides how many drafts a step takes; see DraftBudget."""

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """A step has been taken."""

    def room(self, batch: ScheduledBatch) -> int:
        """Return how many drafts a step of decodes may take at most."""

    def divide(self, batch: ScheduledBatch, chances: list[list[float]], room: int) -> list[int]:
        """Return how many drafts of each sequence a step of decodes takes."""


@dataclass(slots=True)
class _Guess:
    """The last guess at a sample's tokens from token number `at` on, and the chances of its guesses."""

    survival: Survival
    at: int = 0
    draft: Draft | None = None


class Speculator:
    """Speculative decoding by guesses that cost nothing (Leviathan et al. 2023; exact, so nothing is accepted but what
    is drawn anyway).

    A draft is a row like any other: the decode of a token that has not come yet. Each row draws with the random number
    of its own position, so what a row behind a right draft draws is the token that the next step would have drawn; a
    row behind a wrong one is as if it had not been. What it left in the cache is overwritten by the token that came,
    before anybody reads it.

    Drafts go with steps of decodes alone. They need tokens that are known, so not where steps overlap, and logits that
    depend on the tokens before them alone, so not with penalties yet.

    Args:
        drafter: Makes the guesses.
        budget: Decides how many of them a step takes.
    """

    def __init__(self, drafter: Drafter, budget: Budget) -> None:
        self._drafter = drafter
        self._budget = budget
        self._survival = Survival()
        self.num_drafts = 0
        """Rows behind which tokens were guessed."""
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._guesses: dict[Sequence, _Guess] = {}

    def extend(self, batch: ScheduledBatch, blocks: BlockManager, max_rows: int) -> None:
        """Add rows for drafts to a step, up to `max_rows` in all; each comes behind that of the token before it."""
        if not batch.num_decodes or batch.num_prefill_tokens:
            return
        room = min(max_rows - batch.num_decodes, self._budget.room(batch))
        if room <= 0:
            return
        guesses = [self._guess(scheduled) for scheduled in batch.sequences]
        counts = self._budget.divide(batch, [self._chances(guess) for guess in guesses], room)
        if any(counts):
            rows: list[ScheduledSequence] = []
            for scheduled, guess, count in zip(batch.sequences, guesses, counts, strict=True):
                rows.append(scheduled)
                if guess is not None and guess.draft is not None and count:
                    behind = _rows_behind(scheduled, guess.draft, count, blocks, spare=len(batch.sequences))
                    scheduled.seq.group.num_drafts += len(behind)
                    self.num_drafts += bool(behind)
                    rows += behind
            batch.num_drafts = len(rows) - len(batch.sequences)
            self.num_draft_tokens += batch.num_drafts
            batch.num_decodes += batch.num_drafts
            batch.num_tokens += batch.num_drafts
            batch.sequences = rows

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """A step has been taken, and took so long."""
        self._budget.observe(batch, seconds)

    def accept(self, seq: Sequence) -> None:
        """A draft is the token that came, so its row counts as any that was scheduled."""
        seq.num_computed_tokens += 1
        seq.num_pending_tokens += 1
        seq.group.num_accepted_drafts += 1
        self.num_accepted_tokens += 1

    def end(self, group: SequenceGroup) -> None:
        """A request has ended, with its samples as they are."""
        for seq in group.samples:
            self._guesses.pop(seq, None)
        self._drafter.end(group)

    def _guess(self, scheduled: ScheduledSequence) -> _Guess | None:
        """Guess what comes behind the known tokens of a row's sample, having learned from the guess before."""
        seq = scheduled.seq
        if scheduled.token_pending or seq.group.needs_known_tokens:
            return None
        guess = self._guesses.get(seq)
        if guess is None:
            guess = self._guesses[seq] = _Guess(Survival(self._survival))
        elif guess.draft is not None:
            self._learn(seq, guess, guess.draft)
        most = min(_LONGEST_DRAFT, seq.group.max_len - seq.num_tokens)
        guess.at = len(seq.token_ids)
        guess.draft = self._drafter.draft(seq, most) if most > 0 else None
        return guess

    def _learn(self, seq: Sequence, guess: _Guess, draft: Draft) -> None:
        """See how a draft did, of which perhaps nothing was run."""
        for place, (token_id, came) in enumerate(zip(draft.token_ids, seq.token_ids[guess.at :], strict=False)):
            guess.survival.observe(draft.length_at(place), is_right=token_id == came)
            if token_id != came:
                return

    @staticmethod
    def _chances(guess: _Guess | None) -> list[float]:
        if guess is None or guess.draft is None:
            return []
        draft = guess.draft
        return [guess.survival.chance(draft.length_at(place)) for place in range(len(draft.token_ids))]


def _rows_behind(
    scheduled: ScheduledSequence, draft: Draft, count: int, blocks: BlockManager, spare: int
) -> list[ScheduledSequence]:
    """Return the rows of the first `count` tokens of a draft, fewer if there are not enough blocks."""
    seq, start = scheduled.seq, scheduled.position
    room = blocks.extend_ahead(seq, start + count, spare=spare) - start
    seq.num_sent_blocks = len(seq.block_table)  # by the row before them
    return [
        ScheduledSequence(seq, start + place, 1, samples=True, first_new_block=seq.num_sent_blocks, draft=token_id)
        for place, token_id in enumerate(draft.token_ids[: min(count, room)])
    ]
