"""GGUF files of random weights in the shapes of larger models. Speed does not depend on the values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np

from bench.peers.gguf_files import add_fields, write_file


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The shape of a model of the Llama architecture whose output projection is its embedding."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    rope_base: float
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        """Numbers of a head, as readers of the file compute it."""
        return self.hidden_size // self.num_heads

    def matrices(self, vocab_size: int) -> Iterator[tuple[str, int, int]]:
        """Yield name, outputs and inputs of each matrix."""
        yield "token_embd", vocab_size, self.hidden_size
        keys = self.num_kv_heads * self.head_dim
        for layer in range(self.num_layers):
            for name, outputs, inputs in (
                ("attn_q", self.hidden_size, self.hidden_size),
                ("attn_k", keys, self.hidden_size),
                ("attn_v", keys, self.hidden_size),
                ("attn_output", self.hidden_size, self.hidden_size),
                ("ffn_gate", self.intermediate_size, self.hidden_size),
                ("ffn_up", self.intermediate_size, self.hidden_size),
                ("ffn_down", self.hidden_size, self.intermediate_size),
            ):
                yield f"blk.{layer}.{name}", outputs, inputs


SHAPES: Mapping[str, LlamaShape] = MappingProxyType(
    {"llama-3.2-1b": LlamaShape(16, 2048, 8192, 32, 8, 500_000.0, 131_072)}
)


def write_random(target: Path, shape: LlamaShape, name: str, tokenizer: Path, *, seed: int = 0) -> None:
    """Write a GGUF file with random weights: layers in Q4_1, the embedding in Q8_0.

    Args:
        target: The file.
        shape: Shape of the layers.
        name: Name of the model in the file.
        tokenizer: A GGUF file whose tokenizer the file gets. The embedding has a row for each of its tokens.
        seed: The weights follow from it.
    """
    reader = gguf.GGUFReader(tokenizer)
    vocab_size = len(reader.fields["tokenizer.ggml.tokens"].contents())
    writer = gguf.GGUFWriter(target, "llama")
    add_fields(writer, [field for field in reader.fields.values() if field.name.startswith("tokenizer.")])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab_size)
    draw = np.random.default_rng(seed)
    for matrix, outputs, inputs in shape.matrices(vocab_size):
        kind = gguf.GGMLQuantizationType.Q8_0 if matrix == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        # Of the size that keeps activations near 1.
        values = draw.standard_normal((outputs, inputs), np.float32) * np.float32(inputs**-0.5)
        writer.add_tensor(f"{matrix}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    ones = np.ones(shape.hidden_size, np.float32)
    norms = [f"blk.{layer}.{norm}" for layer in range(shape.num_layers) for norm in ("attn_norm", "ffn_norm")]
    for norm in (*norms, "output_norm"):
        writer.add_tensor(f"{norm}.weight", ones)
    write_file(writer)
