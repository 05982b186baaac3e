"""Speculative decoding: adds drafts to steps as rows, accepts them, and learns from their outcomes."""

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
        """Add the measured time of a step, in seconds."""

    def room(self, batch: ScheduledBatch) -> int:
        """Return the most draft tokens that a step of decodes may take."""

    def divide(self, batch: ScheduledBatch, chances: list[list[float]], room: int) -> list[int]:
        """Return how many draft tokens of each sequence a step of decodes takes."""


@dataclass(slots=True)
class _Guess:
    """The last draft of a sample, for its tokens from index `at` on, and the acceptance probabilities of its drafts."""

    survival: Survival
    at: int = 0
    draft: Draft | None = None


class Speculator:
    """Speculative decoding without a draft model (Leviathan et al. 2023). It is exact: a draft token is accepted only
    if it equals the drawn token.

    A draft token is the input of an ordinary decode row. Each row draws with the random number of its own position, so
    a row after a correct draft token draws the token that the next step would have drawn. A row after a wrong one has
    no effect: its cache entry is overwritten with the correct token's before it is read.

    Drafts are added only to steps without prefill. They need known tokens, so there are none where steps overlap, and
    none for samples with penalties, whose logits depend on tokens that are not known yet.

    Args:
        drafter: Makes the drafts.
        budget: Decides how many draft tokens a step takes.
    """

    def __init__(self, drafter: Drafter, budget: Budget) -> None:
        self._drafter = drafter
        self._budget = budget
        self._survival = Survival()
        self.num_drafts = 0
        """Rows that were followed by drafted tokens, since start."""
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._guesses: dict[Sequence, _Guess] = {}

    def extend(self, batch: ScheduledBatch, blocks: BlockManager, max_rows: int) -> None:
        """Add rows for draft tokens to a step, up to `max_rows` rows in total, each right after its
        predecessor's row.
        """
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
        """Add the measured time of a step, in seconds, to the budget."""
        self._budget.observe(batch, seconds)

    def accept(self, seq: Sequence) -> None:
        """Accept a draft token that equals the drawn one, so that its row counts as a scheduled one."""
        seq.num_computed_tokens += 1
        seq.num_pending_tokens += 1
        seq.group.num_accepted_drafts += 1
        self.num_accepted_tokens += 1

    def end(self, group: SequenceGroup) -> None:
        """Forget a request that has ended."""
        for seq in group.samples:
            self._guesses.pop(seq, None)
        self._drafter.end(group)

    def _guess(self, scheduled: ScheduledSequence) -> _Guess | None:
        """Draft the next tokens of a row's sample, after learning from its previous draft; None if it cannot
        have any.
        """
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
        """Compare a draft with the tokens that were drawn, whether or not a step verified it."""
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
    seq.num_sent_blocks = len(seq.block_table)  # the row before them has them sent
    return [
        ScheduledSequence(seq, start + place, 1, samples=True, first_new_block=seq.num_sent_blocks, draft=token_id)
        for place, token_id in enumerate(draft.token_ids[: min(count, room)])
    ]
