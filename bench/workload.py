"""What is sent: closed-loop requests of fixed length, all different, so that no prefix is ever shared."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` prompts of `input_len` random token ids, each answered with exactly `output_len` tokens.

    `concurrency` requests are in flight at any time: the next one is sent when one has ended.
    """

    concurrency: int
    num_requests: int
    input_len: int
    output_len: int
    vocab_size: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        """Token ids per request; the lowest ids are left out, where vocabularies keep their special tokens."""
        rng = random.Random(self.seed)
        lowest = min(256, self.vocab_size // 2)
        return [
            [rng.randrange(lowest, self.vocab_size) for _ in range(self.input_len)] for _ in range(self.num_requests)
        ]
