"""Linear layers: how their weights lie in memory, how they multiply, and which tensors of a checkpoint fill them."""

from scalellm.services.executor.models.linear.checkpoint import (
    Borders,
    CheckpointFormat,
    bias_slots,
    build_weight,
    inner_border,
)
from scalellm.services.executor.models.linear.dense import DenseWeight
from scalellm.services.executor.models.linear.fp8 import Fp8Weight
from scalellm.services.executor.models.linear.packed import PackedLinear
from scalellm.services.executor.models.linear.quantised import (
    Added,
    LinearInput,
    LinearWeight,
    NormedInput,
    QuantisedInput,
    ToAdd,
)
from scalellm.services.executor.models.linear.wna16 import IntWeight

__all__ = [
    "Added",
    "Borders",
    "CheckpointFormat",
    "DenseWeight",
    "Fp8Weight",
    "IntWeight",
    "LinearInput",
    "LinearWeight",
    "NormedInput",
    "PackedLinear",
    "QuantisedInput",
    "ToAdd",
    "bias_slots",
    "build_weight",
    "inner_border",
]
