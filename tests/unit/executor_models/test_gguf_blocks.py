"""GGUF blocks of random bytes kept as packed integers, against the gguf package's own dequantisation."""

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from scalellm.services.executor.models import ModelRuntime, Quantization
from scalellm.services.executor.models.linear import PackedLinear
from scalellm.services.executor.models.linear.gguf_blocks import BLOCK_FORMATS
from scalellm.services.executor.models.linear.stored_gguf import StoredGguf
from scalellm.services.executor.models.shard import Part

CPU = torch.device("cpu")
ROWS, COLUMNS = 6, 512
_HALVES = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}
"""Offsets of a block's float16 numbers; for formats not listed there is one, at its start."""


def random_rows(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return rows as in the file, u8, and the float32 values that they stand for."""
    rng = np.random.default_rng(seed)
    form = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[form]
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // elements, size), dtype=np.uint8)
    for at in _HALVES.get(kind, (0,)):
        halves = rng.normal(0, 0.1, (*blocks.shape[:2], 1)).astype(np.float16)
        halves[rng.random(halves.shape) < 0.1] = 0  # blocks that say nothing, or nothing but their minimum
        blocks[..., at : at + 2] = halves.view(np.uint8)
    rows = blocks.reshape(ROWS, -1)
    return torch.from_numpy(rows), torch.from_numpy(gguf.dequantize(rows, form))


def kept(kinds: list[str], dtype: torch.dtype) -> tuple[PackedLinear, Tensor]:
    """Return a layer that stacks a projection of each kind, and the whole matrix."""
    stored = StoredGguf({f"layer.{i}.weight": kind for i, kind in enumerate(kinds)})
    runtime = ModelRuntime(dtype=dtype, quantization=Quantization("keep"))
    parts = {str(i): Part.all(ROWS) for i in range(len(kinds))}
    layer = PackedLinear("layer", Part.all(COLUMNS), parts, bias=False, stored=stored, runtime=runtime)
    values = []
    for seed, (slot, kind) in enumerate(zip(layer.weight_slots(), kinds, strict=True)):
        rows, meant = random_rows(kind, seed)
        slot.load(rows, CPU)
        values.append(meant)
    return layer, torch.cat(values)


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kind(kind: str, dtype: torch.dtype) -> None:
    layer, expected = kept([kind], dtype)
    got = layer(torch.eye(COLUMNS, dtype=dtype)).T.float()
    # Two roundings of each weight, relative to the largest number of its block times the scale.
    blocks = expected.view(ROWS, -1, 16)
    error = (got.view_as(blocks) - blocks).abs().amax(-1) / blocks.abs().amax(-1).clamp(min=0.02)
    assert error.max() < 4 * torch.finfo(dtype).eps * (16 if "_K" in kind or "_1" in kind else 1)


@pytest.mark.parametrize("kinds", [["Q4_K", "Q4_K", "Q6_K"], ["Q4_0", "Q8_0"], ["Q4_1", "Q5_0", "Q4_0"]])
def test_kinds_that_share_a_matrix(kinds: list[str]) -> None:
    layer, expected = kept(kinds, torch.float32)
    torch.testing.assert_close(layer(torch.eye(COLUMNS)).T, expected, atol=2e-5, rtol=1e-6)


def test_experts_of_a_layer_take_one_form() -> None:
    kinds = {"mlp.experts.0.gate_proj": "Q4_K", "mlp.experts.0.down_proj": "Q6_K", "mlp.gate": "F32"}
    stored = StoredGguf({f"{name}.weight": kind for name, kind in kinds.items()})
    forms = []
    for name in list(kinds)[:2]:
        built = stored.build({name: ROWS}, COLUMNS, ModelRuntime())
        assert built is not None
        forms.append(built[0])
    assert [(form.bits, form.group_size, form.zeros is None) for form in forms] == [(8, 16, False)] * 2


def test_a_kind_without_groups_is_dequantised() -> None:
    stored = StoredGguf({"layer.a.weight": "Q4_0", "layer.b.weight": "Q3_K"})
    assert stored.build({"layer.a": 4, "layer.b": 4}, 256, ModelRuntime()) is None
