import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.kernels import apply_logits_processors_

PENALTIES = {
    "repetition_penalty": torch.tensor([1.0, 1.3, 0.8]),
    "frequency_penalty": torch.tensor([0.5, 0.0, -0.7]),
    "presence_penalty": torch.tensor([0.25, 0.0, 1.5]),
}


def logits_of(vocab, seed=0):
    return torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def entries(count, vocab, seed):
    """Return rows and token ids of distinct entries."""
    flat = torch.randperm(3 * vocab, generator=torch.Generator().manual_seed(seed))[:count]
    return flat // vocab, flat % vocab


def everything(vocab, *, masked_rows=None, biases=9, seen=20):
    g = torch.Generator().manual_seed(vocab)
    bias_rows, bias_ids = entries(min(biases, 2 * vocab), vocab, 1)
    seen_rows, seen_ids = entries(min(seen, 2 * vocab), vocab, 2)
    count = 3 if masked_rows is None else len(masked_rows)
    bits = torch.randint(-(2**31), 2**31, (count, -(-vocab // 32)), generator=g).int()
    return {
        "temperature": torch.tensor([0.7, 0.0, 1.9]),
        "bitmask": bits,
        "mask_rows": None if masked_rows is None else torch.tensor(masked_rows),
        "bias_rows": bias_rows,
        "bias_token_ids": bias_ids,
        "bias_values": torch.randn(len(bias_ids), generator=g),
        "seen_rows": seen_rows,
        "seen_token_ids": seen_ids,
        "seen_output_counts": torch.randint(0, 4, (len(seen_ids),), generator=g, dtype=torch.int32),
        **PENALTIES,
    }


def assert_same(ops, vocab, arguments):
    logits, expected = logits_of(vocab), logits_of(vocab)
    assert ops.apply_logits_processors_(logits, **arguments) is logits
    apply_logits_processors_(expected, **arguments)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


GROUPS = (
    ("temperature",),
    ("bitmask",),
    ("bias_rows", "bias_token_ids", "bias_values"),
    ("seen_rows", "seen_token_ids", "seen_output_counts"),
    *((name,) for name in PENALTIES),
)


@settings(max_examples=20)
@given(chosen=st.sets(st.sampled_from(GROUPS)))
def test_any_of_them(ops, chosen):
    names = [name for group in chosen for name in group]
    assert_same(ops, 70, {name: value for name, value in everything(70).items() if name in names})


def test_logits_that_are_rows_of_a_wider_tensor(ops):
    wide = torch.zeros(3, 100)
    ops.apply_logits_processors_(wide[:, :40], **everything(40))
    assert (wide[:, 40:] == 0).all()
    expected = apply_logits_processors_(torch.zeros(3, 40), **everything(40))
    torch.testing.assert_close(wide[:, :40], expected, atol=1e-6, rtol=1e-6)


def test_an_incomplete_list_is_refused(ops):
    with pytest.raises(ValueError, match="bias_rows, bias_token_ids, bias_values: give all of them or none"):
        ops.apply_logits_processors_(logits_of(40), bias_rows=torch.tensor([0]))
