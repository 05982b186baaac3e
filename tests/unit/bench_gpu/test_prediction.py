"""Decode steps on paper: the share of the ceiling that a target takes of products is the one that reaches it."""

from dataclasses import replace

import pytest

from bench.gpu.prediction import _OVERLAPPED_US, BEFORE, NOW, OPEN, at_share, lone_row_us, needed_share, predict
from bench.gpu.roofline import H200_TARGETS, LLAMA_8B, MIXTRAL


@pytest.mark.parametrize(("name", "precision", "seqs"), list(H200_TARGETS))
def test_products_at_the_needed_share_reach_the_target(name, precision, seqs):
    shape = {"llama-3.1-8b": LLAMA_8B, "mixtral-8x7b": MIXTRAL}[name]
    target = H200_TARGETS[name, precision, seqs]
    for design in (BEFORE, NOW, OPEN):
        share = needed_share(shape, precision, seqs, design, target)
        reached = predict(shape, precision, seqs, at_share(design, precision, share))
        assert 1e3 * seqs / reached.ms == pytest.approx(target)


def test_no_products_reach_what_the_rest_of_a_step_takes_longer_for():
    assert needed_share(LLAMA_8B, "bf16", 1, NOW, 1e6) == float("inf")


def test_launches_that_overlap_save_what_they_hide():
    apart = predict(LLAMA_8B, "bf16", 64, replace(NOW, overlapping=0))
    together = predict(LLAMA_8B, "bf16", 64, NOW)
    hidden_ms = NOW.overlapping * (NOW.gap_us - _OVERLAPPED_US) * LLAMA_8B.layers / 1e3
    assert apart.ms - together.ms == pytest.approx(hidden_ms)


def test_few_rows_have_norms_and_activation_in_their_products():
    fused, apart = predict(LLAMA_8B, "bf16", 16, NOW), predict(LLAMA_8B, "bf16", 16, replace(NOW, fused_rows={}))
    assert apart.launches - fused.launches == 3 * LLAMA_8B.layers
    assert fused.ms < apart.ms
    more = predict(LLAMA_8B, "bf16", 17, NOW)
    assert more == predict(LLAMA_8B, "bf16", 17, replace(NOW, fused_rows={}))
    assert predict(LLAMA_8B, "fp8", 1, NOW) == predict(LLAMA_8B, "fp8", 1, replace(NOW, fused_rows={}))


def test_the_widest_product_is_streamed_as_fast_as_memory_or_the_second_level_cache_is():
    def ms(**changed):
        return predict(LLAMA_8B, "fp8", 64, replace(NOW, **changed)).ms

    assert ms() < ms(wide_rows={})
    assert ms(wide_rows={}) == ms(wide_rows={}, second_level=1000.0)  # torch's are not asked
    slow, slower = ms(second_level=1000.0), ms(second_level=500.0)
    weight = LLAMA_8B.hidden * 2 * LLAMA_8B.intermediate
    read = weight * (1 + 64 / 256)  # each program reads all of the input for its 256 rows of the weight
    assert slower - slow == pytest.approx(read * (1 / 500e6 - 1 / 1000e6) * LLAMA_8B.layers)
    assert predict(LLAMA_8B, "fp8", 65, NOW) == predict(LLAMA_8B, "fp8", 65, replace(NOW, wide_rows={}))


def test_a_long_sequence_among_short_ones_takes_the_time_of_its_bytes_once_it_has_enough_shares():
    rank = replace(LLAMA_8B, kv_heads=2, q_heads=8)
    few = lone_row_us(rank, 100_000, replace(NOW, most_shares=4))
    assert few == pytest.approx(2 * lone_row_us(rank, 100_000, replace(NOW, most_shares=8)), rel=0.05)
    assert lone_row_us(rank, 100_000, NOW) == lone_row_us(rank, 100_000, replace(NOW, most_shares=1000))


def test_products_that_are_launched_here_overlap_as_well():
    together, apart = (predict(LLAMA_8B, "int4", 1, replace(NOW, packed_overlap=early)) for early in (True, False))
    hidden_ms = (4 + 3) * (NOW.gap_us - _OVERLAPPED_US) * LLAMA_8B.layers / 1e3
    assert apart.ms - together.ms == pytest.approx(hidden_ms)


def test_a_product_saves_what_was_fetched_of_its_weight_while_memory_was_idle():
    """But no more than memory delivers in that time, and nothing where it does not wait for its weight."""
    for precision, seqs in (("fp8", 1), ("fp8", 64), ("bf16", 1), ("bf16", 64)):
        apart, ahead = (predict(LLAMA_8B, precision, seqs, replace(NOW, ahead_bytes=n)).ms for n in (0, 12 << 20))
        fewer = predict(LLAMA_8B, precision, seqs, replace(NOW, ahead_bytes=1 << 20)).ms
        assert ahead < fewer < apart
        assert apart - ahead < 4 * LLAMA_8B.layers * 4e-3
    for precision, seqs in (("bf16", 256), ("int4", 64), ("fp8", 257)):
        assert predict(LLAMA_8B, precision, seqs, replace(NOW, ahead_bytes=0)) == predict(
            LLAMA_8B, precision, seqs, NOW
        )
