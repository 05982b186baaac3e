import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from scalellm.kernels import apply_logits_processors_


def logits_of(rows=3, vocab=70, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_nothing_asked_nothing_changed():
    logits = logits_of()
    assert apply_logits_processors_(logits) is logits
    assert torch.equal(logits, logits_of())


@pytest.mark.parametrize("vocab", [31, 32, 33, 70])
@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_bitmask(vocab, rows):
    allowed = torch.rand(3 if rows is None else 2, vocab, generator=torch.Generator().manual_seed(1)) < 0.5
    words = torch.zeros(len(allowed), -(-vocab // 32), dtype=torch.int64)
    for r, t in allowed.nonzero().tolist():
        words[r, t // 32] |= 1 << (t % 32)
    logits = logits_of(vocab=vocab)
    expected = logits.clone()
    for i, row in enumerate(range(3) if rows is None else rows):
        expected[row][~allowed[i]] = -torch.inf
    apply_logits_processors_(
        logits, bitmask=words.to(torch.int32), mask_rows=None if rows is None else torch.tensor(rows)
    )
    assert torch.equal(logits, expected)


def test_bias():
    logits = logits_of()
    expected = logits.clone()
    expected[0, 5] += 2.5
    expected[2, 69] -= 100
    expected[2, 0] = -torch.inf
    apply_logits_processors_(
        logits,
        bias_rows=torch.tensor([0, 2, 2]),
        bias_token_ids=torch.tensor([5, 69, 0]),
        bias_values=torch.tensor([2.5, -100.0, -torch.inf]),
    )
    assert torch.equal(logits, expected)


def seen(*rows):
    """Return the flat lists for rows given as {token: count in the output}."""
    entries = [(r, t, c) for r, tokens in enumerate(rows) for t, c in tokens.items()]
    r, t, c = zip(*entries, strict=True)
    return {
        "seen_rows": torch.tensor(r),
        "seen_token_ids": torch.tensor(t),
        "seen_output_counts": torch.tensor(c, dtype=torch.int32),
    }


def test_repetition_penalty_as_transformers():
    logits = logits_of()
    history = torch.tensor([[1, 2, 3, 60], [9, 9, 8, 7], [0, 69, 5, 5]])
    expected = torch.cat(
        [
            RepetitionPenaltyLogitsProcessor(penalty)(history[i : i + 1], logits[i : i + 1].clone())
            for i, penalty in enumerate((1.0, 1.3, 0.8))
        ]
    )
    apply_logits_processors_(
        logits,
        **seen({1: 0, 2: 1, 3: 0, 60: 0}, {9: 2, 8: 0, 7: 0}, {0: 0, 69: 0, 5: 1}),
        repetition_penalty=torch.tensor([1.0, 1.3, 0.8]),
    )
    torch.testing.assert_close(logits, expected)


def test_frequency_and_presence_penalty_count_the_output_only():
    logits = logits_of()
    expected = logits.clone()
    expected[1, 4] -= 0.5 * 3 + 0.25
    expected[1, 6] -= 0.5 * 1 + 0.25
    apply_logits_processors_(
        logits,
        **seen({4: 7}, {4: 3, 6: 1, 8: 0}),
        frequency_penalty=torch.tensor([0.0, 0.5, 9.0]),
        presence_penalty=torch.tensor([0.0, 0.25, 9.0]),
    )
    torch.testing.assert_close(logits, expected)


def test_order_bias_then_penalties_then_temperature():
    logits = torch.zeros(1, 33)
    apply_logits_processors_(
        logits,
        temperature=torch.tensor([0.5]),
        bias_rows=torch.tensor([0]),
        bias_token_ids=torch.tensor([3]),
        bias_values=torch.tensor([4.0]),
        **seen({3: 1}),
        repetition_penalty=torch.tensor([2.0]),
        frequency_penalty=torch.tensor([0.5]),
        presence_penalty=torch.tensor([0.25]),
        bitmask=torch.tensor([[-1, 0]], dtype=torch.int32),
    )
    assert logits[0, 3].item() == (4.0 / 2.0 - 0.5 - 0.25) / 0.5
    assert logits[0, 32].item() == -torch.inf
    assert (logits[0, :3] == 0).all()


def test_temperature_leaves_greedy_rows():
    logits = logits_of()
    expected = logits / torch.tensor([[1.0], [0.5], [2.0]])
    apply_logits_processors_(logits, temperature=torch.tensor([0.0, 0.5, 2.0]))
    torch.testing.assert_close(logits, expected)


def test_an_incomplete_list_is_refused():
    entries = seen({1: 1}, {}, {})
    del entries["seen_output_counts"]
    with pytest.raises(ValueError, match="seen_rows, seen_token_ids, seen_output_counts: give all of them or none"):
        apply_logits_processors_(logits_of(), **entries, presence_penalty=torch.ones(3))
