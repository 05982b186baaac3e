"""The least time that the work can take: bytes that have to move, and products that have to be formed.

Every weight and every cached token that is needed is read once and every result written once, at the bandwidth
measured; products run at the rate measured for their operands. An operator takes the longer of the two, operators
follow each other, and there is nothing between them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from types import MappingProxyType
from typing import Any, Literal

from scalellm.services.executor.models import PRESETS, ModelConfig

Precision = Literal["bf16", "fp8", "int4"]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates that the device reached in this run: GB/s of a copy (read and written) and of reading alone, TFLOP/s, and
    microseconds between two kernels of a graph.
    """

    copy: float
    read: float
    bf16: float
    fp8: float
    gap_us: float

    @classmethod
    def of(cls, shared: Mapping[str, Any]) -> Ceilings:
        """Return what the environment part shared; of a run in which that was stopped, what is assumed."""
        return cls(**shared["ceilings"]) if "ceilings" in shared else ASSUMED

    def move_us(self, num_bytes: float, written: float = 0.0) -> float:
        """Return the least microseconds in which so many bytes are moved, `written` of them written, the rest read.

        A copy's time is that of its reads and that of its writes; reading alone tells the first.
        """
        read_us = 1.0 / (max(self.read, self.copy) * 1e3)  # of a byte
        written_us = max(0.0, 2.0 / (self.copy * 1e3) - read_us)
        return (num_bytes - written) * read_us + written * written_us

    def to_json(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)


# Of an H200: the copy and the bf16 product were measured on one, the others follow from them.
ASSUMED = Ceilings(copy=4300.0, read=4300.0, bf16=790.0, fp8=1580.0, gap_us=1.2)


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes moved, those of them that are written, and floating-point operations of the products, by the precision
    that these can be formed in.

    `written` may be left out where it is next to nothing of what is moved.
    """

    num_bytes: float
    bf16_flops: float = 0.0
    fp8_flops: float = 0.0
    written: float = 0.0

    def floor_us(self, ceilings: Ceilings) -> float:
        """Return the least microseconds."""
        arithmetic = self.bf16_flops / (ceilings.bf16 * 1e6) + self.fp8_flops / (ceilings.fp8 * 1e6)
        return max(ceilings.move_us(self.num_bytes, self.written), arithmetic)

    def is_bandwidth(self, ceilings: Ceilings) -> bool:
        """True if moving bytes takes longer than arithmetic."""
        return ceilings.move_us(self.num_bytes, self.written) >= self.floor_us(ceilings)


def sum_of(costs: Iterable[Cost]) -> Cost:
    """Return the cost of several pieces of work as one operator's."""
    rows = zip(*(astuple(cost) for cost in costs), strict=True)
    return Cost(*(sum(row) for row in rows))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder. `experts` is 0 for a dense model."""

    name: str
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    choices: int = 1
    qk_norm: bool = False

    @classmethod
    def of(cls, name: str, config: ModelConfig) -> ModelShape:
        """Return the sizes of a model."""
        return cls(
            name,
            config.hidden_size,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.moe_intermediate_size or config.intermediate_size,
            config.vocab_size,
            config.num_experts,
            config.num_experts_per_token or 1,
            config.qk_norm,
        )

    @property
    def qkv_columns(self) -> int:
        """Outputs of the packed projection."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim


LLAMA_8B = ModelShape.of("Llama-3.1-8B", PRESETS["llama-3.1-8b"])
QWEN3_8B = ModelShape.of("Qwen3-8B", PRESETS["qwen3-8b"])
MIXTRAL = ModelShape.of("Mixtral-8x7B", PRESETS["mixtral-8x7b"])

# Tokens per second of a decode step on an H200, by preset, format and rows.
H200_TARGETS: Mapping[tuple[str, Precision, int], int] = MappingProxyType(
    {
        ("llama-3.1-8b", "bf16", 1): 213,
        ("llama-3.1-8b", "bf16", 64): 8500,
        ("llama-3.1-8b", "fp8", 1): 370,
        ("llama-3.1-8b", "fp8", 64): 15000,
        ("mixtral-8x7b", "fp8", 64): 3900,
    }
)

# Of a weight: 4 bits, and a bfloat16 scale and zero point for each 128.
_WEIGHT_BYTES: Mapping[Precision, float] = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + 4 / 128}


def linear(rows: int, inner: int, columns: int, precision: Precision) -> Cost:
    """Return the cost of a product with a weight; activations are bfloat16 at both ends."""
    flops = 2.0 * rows * inner * columns
    moved = inner * columns * _WEIGHT_BYTES[precision] + 2.0 * rows * (inner + columns)
    return Cost(moved, fp8_flops=flops) if precision == "fp8" else Cost(moved, bf16_flops=flops)


def experts_hit(shape: ModelShape, tokens: int) -> float:
    """Return how many experts `tokens` tokens reach on average, when all are equally likely."""
    return shape.experts * (1 - (1 - shape.choices / shape.experts) ** tokens)


def expert_layer(shape: ModelShape, tokens: int, precision: Precision) -> Cost:
    """Return the cost of both products of an expert layer."""
    weights = experts_hit(shape, tokens) * 3 * shape.hidden * shape.intermediate
    rows = tokens * shape.choices
    flops = 6.0 * rows * shape.hidden * shape.intermediate
    moved = weights * _WEIGHT_BYTES[precision] + 2.0 * rows * (2 * shape.hidden + 4 * shape.intermediate)
    return Cost(moved, fp8_flops=flops) if precision == "fp8" else Cost(moved, bf16_flops=flops)


def decode_attention(shape: ModelShape, seqs: int, context: int, kv_bytes: int) -> Cost:
    """Return the cost of one query for each sequence over its cached tokens."""
    cached = 2.0 * seqs * context * shape.kv_heads * shape.head_dim * kv_bytes
    ends = 4.0 * seqs * shape.q_heads * shape.head_dim
    return Cost(cached + ends, bf16_flops=4.0 * seqs * context * shape.q_heads * shape.head_dim)


def prefill_attention(shape: ModelShape, seqs: int, tokens: int, kv_bytes: int) -> Cost:
    """Return the cost of whole prompts of `tokens` tokens each, causal."""
    moved = seqs * tokens * (2.0 * shape.kv_heads * kv_bytes + 4.0 * shape.q_heads) * shape.head_dim
    pairs = tokens * (tokens + 1) / 2
    return Cost(moved, bf16_flops=4.0 * seqs * pairs * shape.q_heads * shape.head_dim)


def step(shape: ModelShape, seqs: int, tokens: int, context: int, precision: Precision, kv_bytes: int) -> list[Cost]:
    """Return the operators of one step, in which each of `seqs` sequences has `tokens` new tokens.

    With one token, each attends to `context` cached ones; with more, they are a whole prompt.
    """
    rows = seqs * tokens
    heads = 2.0 * rows * (2 * shape.qkv_columns)
    if tokens == 1:
        attention = decode_attention(shape, seqs, context, kv_bytes)
    else:
        attention = prefill_attention(shape, seqs, tokens, kv_bytes)
    norm = Cost(8.0 * rows * shape.hidden)
    layer = [
        norm,
        linear(rows, shape.hidden, shape.qkv_columns, precision),
        Cost(heads),  # rotation and cache write
        attention,
        linear(rows, shape.q_heads * shape.head_dim, shape.hidden, precision),
        norm,
    ]
    if shape.experts:
        layer += [linear(rows, shape.hidden, shape.experts, "bf16"), expert_layer(shape, rows, precision)]
    else:
        layer += [
            linear(rows, shape.hidden, 2 * shape.intermediate, precision),
            Cost(6.0 * rows * shape.intermediate),
            linear(rows, shape.intermediate, shape.hidden, precision),
        ]
    logits = linear(seqs, shape.hidden, shape.vocab, "bf16")
    return [Cost(4.0 * rows * shape.hidden), *(layer * shape.layers), norm, logits, Cost(4.0 * seqs * shape.vocab)]


def step_floor_us(
    shape: ModelShape,
    ceilings: Ceilings,
    *,
    seqs: int,
    tokens: int = 1,
    context: int = 0,
    precision: Precision = "bf16",
    kv_bytes: int = 2,
) -> float:
    """Return the least microseconds of one step of the whole model, sampling included."""
    return sum(cost.floor_us(ceilings) for cost in step(shape, seqs, tokens, context, precision, kv_bytes))


def main() -> None:
    """Print what the model on paper says."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.roofline")
    parser.add_argument("--predict", action="store_true", required=True, help="decode steps of an H200, on paper")
    parser.parse_args()
    from bench.gpu.prediction import table

    print(table())


if __name__ == "__main__":
    main()
