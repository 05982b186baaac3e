"""The model on paper of a decode step, against what was worked out by hand."""

import pytest

from bench.gpu.prediction import BEFORE, NOW, OPEN, predict, rereads, table
from bench.gpu.roofline import H200_TARGETS, LLAMA_8B, MIXTRAL

SHAPES = {"llama-3.1-8b": LLAMA_8B, "mixtral-8x7b": MIXTRAL}


@pytest.mark.parametrize(
    ("name", "precision", "seqs", "floor", "before"),
    [
        ("llama-3.1-8b", "bf16", 1, 3.52, 5.3),
        ("llama-3.1-8b", "bf16", 64, 5.64, 7.9),
        ("llama-3.1-8b", "bf16", 256, 13.1, 17.1),
        ("llama-3.1-8b", "fp8", 1, 1.89, 3.7),
        ("llama-3.1-8b", "fp8", 64, 3.02, 5.4),
        ("llama-3.1-8b", "fp8", 256, 6.85, 11.8),
        ("llama-3.1-8b", "int4", 1, 1.14, 3.3),
        ("llama-3.1-8b", "int4", 64, 3.46, 7.6),
        ("mixtral-8x7b", "fp8", 64, 12.1, 26),
    ],
)
def test_the_code_before_is_as_an_expert_worked_it_out(name, precision, seqs, floor, before):
    found = predict(SHAPES[name], precision, seqs, BEFORE)
    assert found.floor_ms == pytest.approx(floor, rel=0.03)
    assert found.ms == pytest.approx(before, rel=0.1)


def test_how_often_an_experts_weight_was_read():
    times = [rereads(tokens, 8, 2, 16) for tokens in (48, 64, 96, 128, 192, 240)]
    assert times == pytest.approx([1.07, 1.43, 1.99, 2.45, 3.46, 4.21], abs=0.01)
    assert rereads(64, 8, 2, 64) == pytest.approx(1)


def test_every_change_is_one_for_the_better_and_the_targets_can_be_reached():
    text = table()
    for (name, precision, seqs), target in H200_TARGETS.items():
        times = [predict(SHAPES[name], precision, seqs, design).ms for design in (BEFORE, NOW, OPEN)]
        assert times == sorted(times, reverse=True)
        assert 1e3 * seqs / times[-1] >= target
        assert f"{target:,}" in text
