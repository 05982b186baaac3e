"""Embedding and output projection, the two matrices with a row for every token."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.linear import DenseWeight, IntWeight, build_weight
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot, finish_with


class Vocabulary:
    """The embedding of tokens and the projection to their logits, of one matrix where the model ties them.

    They are in full precision, with one exception. On a CPU whose ops multiply 8-bit weights (`kernels.cpu`), where a
    small model's output projection is the largest matrix of every step, they have 8 bits whenever linear layers are
    quantised to 8 or to 4, and what the file has when that is kept.
    """

    def __init__(self, config: ModelConfig, runtime: ModelRuntime) -> None:
        self._runtime = runtime
        self._embedding, self._slots = _build("model.embed_tokens", config, runtime)
        self._head = self._embedding
        self._head_slots: list[WeightSlot] = []
        if not config.tie_word_embeddings:
            self._head, self._head_slots = _build("lm_head", config, runtime)

    def embed(self, input_ids: Tensor, *, scale: float = 1.0) -> Tensor:
        """`[T]` i64 -> `[T, H]`, times `scale`."""
        return self._embedding.rows(input_ids, scale=scale)

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`[R, H]` -> `[R, V]` float32, in `out` where it is given."""
        if self._runtime.dtype == torch.float32:
            return self._head.product(hidden, None, out=out)
        product = self._head.product(hidden, None)
        return product.float() if out is None else out.copy_(product)

    def embedding_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of the embedding, which are those of the projection, too, where they are tied."""
        yield from self._slots

    def head_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of a projection that has a matrix of its own."""
        yield from self._head_slots


def _build(name: str, config: ModelConfig, runtime: ModelRuntime) -> tuple[DenseWeight | IntWeight, list[WeightSlot]]:
    wanted, stored = runtime.quantization, config.stored_linears
    method = wanted.method
    if runtime.ops.backends["w8a16_gemm"] != "cpp" or (stored is not None and not stored.is_choice):
        method = "none"
    if method != "keep":
        stored = None
        method = "int8" if method in ("int8", "int4") else "none"
    runtime = replace(runtime, quantization=replace(wanted, method=method))
    weight, slots = build_weight({name: config.vocab_size}, config.hidden_size, stored, runtime)
    assert isinstance(weight, DenseWeight | IntWeight)
    finish_with(weight.finish, slots)
    return weight, slots
