"""Changes to the logits of one sequence before a token is drawn."""

from collections.abc import Sequence as ReadOnlySequence

import numpy as np
import numpy.typing as npt

from scalellm.services.executor.engine.sequence import Sequence

_Ids = npt.NDArray[np.int64]
_Counts = npt.NDArray[np.int32]
_Values = npt.NDArray[np.float32]


class SeenTokens:
    """The distinct tokens of one sequence with their counts in the output, grown in place: O(1) per new token."""

    def __init__(self, seq: Sequence, capacity: int) -> None:
        self._slots: dict[int, int] = {}
        self._ids: _Ids = np.zeros(capacity, np.int64)
        self._counts: _Counts = np.zeros(capacity, np.int32)
        num_prompt = seq.group.num_prompt_tokens
        # Presence and frequency penalties are about the output alone; only repetition looks at the prompt.
        if seq.group.request.sampling.repetition_penalty != 1.0:
            distinct = list(dict.fromkeys(seq.token_ids[:num_prompt]))
            self._slots = {token_id: slot for slot, token_id in enumerate(distinct)}
            self._ids[: len(distinct)] = distinct
        self._num_noted = num_prompt

    def update(self, token_ids: ReadOnlySequence[int]) -> tuple[_Ids, _Counts]:
        """Note the output tokens since the last call; return (ids `[K]`, counts in the output `[K]`)."""
        for index in range(self._num_noted, len(token_ids)):
            token_id = token_ids[index]
            slot = self._slots.get(token_id)
            if slot is None:
                slot = self._slots[token_id] = len(self._slots)
                self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_noted = len(token_ids)
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]


class Bias:
    """The logit bias of one sequence, with and without the ban on stop tokens that min_tokens asks for."""

    def __init__(self, seq: Sequence) -> None:
        group = seq.group
        plain = dict(group.request.sampling.logit_bias)
        # With a grammar its mask says which tokens may come.
        stops = frozenset() if group.request.grammar else group.stop_ids
        banned = plain | dict.fromkeys(stops, float("-inf"))
        self._min_tokens = group.request.sampling.min_tokens
        self._plain = (np.array(list(plain), np.int64), np.array(list(plain.values()), np.float32))
        self._banned = (np.array(list(banned), np.int64), np.array(list(banned.values()), np.float32))

    def current(self, num_output_tokens: int) -> tuple[_Ids, _Values]:
        """Return (token ids `[B]`, values `[B]`) for the next token."""
        return self._banned if num_output_tokens < self._min_tokens else self._plain
