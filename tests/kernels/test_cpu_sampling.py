"""The sampler in C++ against its torch form, whose own oracle is a sort in float64 (`test_sampling.py`)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.kernels import Capability, Ops, SampleOutput, apply_logits_processors_, sample, select_ops


@pytest.fixture(scope="module")
def cpp() -> Ops:
    chosen = select_ops(Capability(sm=0, num_sms=1), dtype=torch.float32)
    if chosen.backends["sample"] != "cpp":
        pytest.skip("there is no compiler")
    return chosen


def columns(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Temperatures, top_k, top_p, min_p, seeds and positions: every filter alone, off, and beside the others."""

    def pick(values, dtype):
        return torch.tensor(values, dtype=dtype)[torch.randint(0, len(values), (rows,), generator=generator)]

    return (
        pick([0.0, 1e-30, 0.2, 0.8, 1.0, 1.5, 1e6], torch.float32),
        pick([0, -1, 1, 2, 7, 50, 600, 10**6], torch.int64),
        pick([1.0, 1.5, 0.0, 0.03, 0.61, 0.93, 0.9999], torch.float32),
        pick([0.0, 0.0, -1.0, 0.05, 0.3, 1.0, 2.0], torch.float32),
        torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        torch.randint(0, 10**6, (rows,), generator=generator),
    )


def assert_same(got: SampleOutput, expected: SampleOutput) -> None:
    assert got.token_ids.tolist() == expected.token_ids.tolist()
    assert got.top_ids.tolist() == expected.top_ids.tolist()
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=5e-5, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(got.top_logprobs, expected.top_logprobs, atol=5e-5, rtol=1e-6, equal_nan=True)


@settings(max_examples=60)
@given(
    vocab=st.sampled_from([1, 2, 17, 255, 256, 257, 1100, 5000]),
    spread=st.sampled_from([0.0, 0.3, 3.0, 12.0, 80.0]),
    levels=st.sampled_from([None, 1.0, 4.0]),  # few distinct logits: ties everywhere
    holes=st.sampled_from([0.0, 0.5, 0.999]),  # that share of logits is -inf
    has_raw=st.booleans(),
    num_logprobs=st.integers(0, 20),
    seed=st.integers(0, 999),
)
def test_draws_are_those_of_the_torch_form(cpp, vocab, spread, levels, holes, has_raw, num_logprobs, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, vocab, generator=generator) * spread
    if levels is not None:
        logits = (logits * levels).round() / levels
    raw = logits.clone() if has_raw else None
    logits.masked_fill_(torch.rand(9, vocab, generator=generator) < holes, -torch.inf)
    before = logits.clone()
    args, options = columns(9, generator), {"num_logprobs": min(num_logprobs, vocab), "logprob_logits": raw}
    assert_same(cpp.sample(logits, *args, **options), sample(logits, *args, **options))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab", [40, 700])
def test_rows_without_a_finite_maximum_are_the_torch_form_s(cpp, vocab):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0] = -torch.inf
    logits[1, [vocab // 2, vocab - 1]] = torch.nan
    logits[2] = torch.nan
    logits[3, [3, vocab - 2]] = torch.inf
    logits[4, 5], logits[4, vocab - 3] = torch.inf, torch.nan
    args = (*(torch.full((6,), x) for x in (0.7, 0.0, 0.9, 0.0)), torch.arange(6), torch.arange(6))
    got, expected = cpp.sample(logits, *args, num_logprobs=3), sample(logits, *args, num_logprobs=3)
    assert got.token_ids.tolist() == expected.token_ids.tolist()
    assert got.logprobs.isnan().tolist() == [True] * 5 + [False]
    assert_same(SampleOutput(*(part[5:] for part in got)), SampleOutput(*(part[5:] for part in expected)))


def test_results_go_where_they_are_wanted_and_rows_may_lie_apart(cpp):
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(4, 1000, generator=generator)
    logits, args = wide[:, 100:800], columns(4, generator)
    out = cpp.sample(logits.contiguous(), *args, num_logprobs=3)
    places = SampleOutput(*(torch.zeros_like(part) for part in out))
    assert cpp.sample(logits, *args, num_logprobs=3, out=places) is places
    for place, part in zip(places, out, strict=True):
        assert torch.equal(place, part)


def test_log_probabilities_of_a_wide_row_are_those_of_float64(cpp):
    logits = torch.randn(2, 262_144, generator=torch.Generator().manual_seed(0)) * 3
    zeros = torch.zeros(2)
    got = cpp.sample(logits, zeros, zeros, zeros, zeros, zeros.long(), zeros.long(), num_logprobs=4)
    values, ids = logits.double().log_softmax(-1).topk(4)
    assert torch.equal(got.top_ids, ids)
    torch.testing.assert_close(got.top_logprobs.double(), values, atol=2e-6, rtol=0)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_masks_are_those_of_the_torch_form(cpp: Ops, vocab: int, share: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows, words = 5, -(-vocab // 32)
    allowed = torch.rand(rows, words * 32, generator=generator) < share
    allowed[2], allowed[3] = True, False
    bits = (allowed.view(rows, words, 32).long() << torch.arange(32)).sum(-1)
    bitmask = (bits - (bits >= 2**31).long() * 2**32).int()
    wide = torch.randn(rows, vocab + 7, generator=generator)
    logits = wide[:, :vocab]
    expected = apply_logits_processors_(logits.clone(), bitmask=bitmask)
    assert torch.equal(expected == -torch.inf, ~allowed[:, :vocab])
    beside = wide[:, vocab:].clone()
    got = cpp.apply_logits_processors_(logits, bitmask=bitmask)
    assert got is logits
    assert torch.equal(got, expected)
    assert torch.equal(wide[:, vocab:], beside)


def test_a_mask_beside_other_processors_comes_after_them(cpp: Ops) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 70, generator=generator)
    at = torch.tensor([0, 2])
    options: dict[str, torch.Tensor] = {
        "bitmask": torch.randint(-(2**31), 2**31, (3, 3), generator=generator).int(),
        "bias_rows": at, "bias_token_ids": at + 40, "bias_values": torch.tensor([3.0, torch.inf]),
        "seen_rows": at, "seen_token_ids": at + 5, "seen_output_counts": torch.tensor([1, 0], dtype=torch.int32),
        "repetition_penalty": torch.tensor([1.5, 1.0, 0.5]), "temperature": torch.tensor([0.5, 0.0, 2.0]),
    }  # fmt: skip
    expected = apply_logits_processors_(logits.clone(), **options)
    assert torch.equal(cpp.apply_logits_processors_(logits.clone(), **options), expected)
    only_some = {"bitmask": options["bitmask"][:2], "mask_rows": at}
    expected = apply_logits_processors_(logits.clone(), **only_some)
    assert torch.equal(cpp.apply_logits_processors_(logits, **only_some), expected)
