"""Embedding and output projection, the two matrices with a row for every token."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.linear import DenseWeight, IntWeight, build_weight
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.shard import Part, join_columns
from scalellm.services.executor.models.weight_slot import WeightSlot, finish_with


class Vocabulary:
    """The embedding of tokens and the projection to their logits, of one matrix where the model ties them.

    They are in full precision, with one exception. On a CPU whose ops multiply 8-bit weights (`kernels.cpu`), they have
    8 bits if linear layers are quantised to 8 or 4 bits, and the file's form if that is kept, because a small model's
    output projection is the largest matrix of every step. A rank of several has the rows of some tokens.
    """

    def __init__(self, config: ModelConfig, runtime: ModelRuntime) -> None:
        self._runtime = runtime
        self._parts = runtime.shard.vocabulary(config.vocab_size)
        self.own = self._parts[runtime.shard.rank]
        """The tokens of this rank."""
        self._embedding, self._slots = _build("model.embed_tokens", self.own, config, runtime)
        self._head = self._embedding
        self._head_slots: list[WeightSlot] = []
        if not config.tie_word_embeddings:
            self._head, self._head_slots = _build("lm_head", self.own, config, runtime)

    def embed(self, input_ids: Tensor, *, scale: float = 1.0) -> Tensor:
        """`[T]` i64 -> `[T, H]`, times `scale`."""
        if not self.own.is_cut:
            return self._embedding.rows(input_ids, scale=scale)
        is_own = (input_ids >= self.own.start) & (input_ids < self.own.stop)
        rows = self._embedding.rows(torch.where(is_own, input_ids - self.own.start, 0), scale=scale)
        # Sums of one row and zeros are exact. Not multiplied by 0: what is not finite would stay so.
        return self._runtime.shard.collectives.all_reduce(torch.where(is_own.unsqueeze(1), rows, 0.0))

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`[R, H]` -> `[R, V]` float32, in `out` where it is given: of the tokens of this rank."""
        if self._runtime.dtype == torch.float32:
            return self._head.product(hidden, None, out=out)
        product = self._head.product(hidden, None)
        return product.float() if out is None else out.copy_(product)

    def joined(self, logits: Tensor) -> Tensor:
        """Return the logits `[R, V]` of all tokens, given those of this rank's."""
        if not self.own.is_cut:
            return logits
        widest = max(part.size for part in self._parts)
        padded = F.pad(logits, (0, widest - self.own.size)).contiguous()
        return join_columns(self._runtime.shard.collectives.all_gather(padded), self._parts)

    def most_likely(self, logits: Tensor) -> Tensor:
        """Return the token ids `[R]` i64 with the largest logits, the lowest of equals. Ranks exchange 16 bytes per
        row.

        `logits` are those of this rank's tokens.
        """
        largest, ids = logits.max(dim=1)  # the first of equal ones
        pairs = torch.stack((largest.double(), (ids + self.own.start).double()))
        gathered = self._runtime.shard.collectives.all_gather(pairs)  # ranks with lower ids come first
        rank = gathered[:, 0].max(dim=0).indices
        return gathered[:, 1].gather(0, rank.unsqueeze(0)).squeeze(0).long()

    def embedding_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of the embedding, which are those of the projection, too, where they are tied."""
        yield from self._slots

    def head_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of a projection that has a matrix of its own."""
        yield from self._head_slots


def _build(
    name: str, tokens: Part, config: ModelConfig, runtime: ModelRuntime
) -> tuple[DenseWeight | IntWeight, list[WeightSlot]]:
    wanted, stored = runtime.quantization, config.stored_linears
    method = wanted.method
    if runtime.ops.backends["w8a16_gemm"] != "cpp" or (stored is not None and not stored.is_choice):
        method = "none"
    if method != "keep":
        stored = None
        method = "int8" if method in ("int8", "int4") else "none"
    runtime = replace(runtime, quantization=replace(wanted, method=method))
    weight, slots = build_weight({name: tokens}, Part.all(config.hidden_size), stored, runtime)
    assert isinstance(weight, DenseWeight | IntWeight)
    finish_with(weight.finish, slots)
    return weight, slots
