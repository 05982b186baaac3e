"""Quantisation of weights while a model is loaded."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["none", "keep", "fp8", "int8", "int4"]


@dataclass(frozen=True)
class Quantization:
    """Quantisation of the weights of linear layers. Norms and routers stay as they are, and so do the embedding and the
    output projection except on a CPU (`vocabulary.Vocabulary`).

    none: the runtime's dtype, except for a checkpoint that is quantised and has no other.
    keep: as the checkpoint stores them, where there is an op for that: the blocks of a GGUF file are kept, and on a CPU
    numbers of 16 bits.
    fp8: e4m3, one scale per row or per matrix (`granularity`); inputs are quantised as well, per token.
    int8, int4: integers in groups of `group_size` inputs with a common scale and, with 4 bits, a common zero point;
    fewer, the greatest common divisor, where that does not divide their number.
    """

    method: Method = "none"
    granularity: Literal["row", "tensor"] = "row"
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be positive")
