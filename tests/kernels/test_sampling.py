import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.kernels import sample_seed
from scalellm.kernels.spec.draws import chi_square_limit

MASK = (1 << 64) - 1


def mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def splitmix(state: int, n: int) -> int:
    return mix64((state + (n + 1) * 0x9E3779B97F4A7C15) & MASK)


def naive_gumbel(seed: int, position: int, token: int) -> float:
    key = splitmix(splitmix(seed & MASK, 0), position)
    return -math.log(-math.log(((splitmix(key, token) >> 40) + 0.5) * 2.0**-24))


def naive_survivors(row: torch.Tensor, temperature: float, k: int, p: float, min_p: float) -> set[int]:
    """Filter by sorting, in float64, token by token."""
    scaled = {t: x / temperature for t, x in enumerate(row.double().tolist())}
    if 0 < k < len(scaled):
        kth = sorted(scaled.values(), reverse=True)[k - 1]
        scaled = {t: x for t, x in scaled.items() if x >= kth}
    if p < 1:
        largest = max(scaled.values())
        mass = {t: math.exp(x - largest) for t, x in scaled.items()}
        total, reached, bound = sum(mass.values()), 0.0, largest
        for t in sorted(scaled, key=lambda t: -scaled[t]):
            bound = scaled[t]
            reached += mass[t]
            if reached >= p * total:
                break
        scaled = {t: x for t, x in scaled.items() if x >= bound}
    if min_p > 0:
        largest = max(scaled.values())
        scaled = {t: x for t, x in scaled.items() if math.exp(x - largest) >= min_p or x == largest}
    return set(scaled)


def naive_sample(row, temperature, k, p, min_p, seed, position) -> int:
    if temperature == 0:
        return row.tolist().index(max(row.tolist()))
    values = row.double().tolist()
    largest = max(values)
    return max(
        sorted(naive_survivors(row, temperature, k, p, min_p)),
        key=lambda t: (values[t] - largest) / temperature + naive_gumbel(seed, position, t),
    )


@pytest.fixture(scope="session")
def draw(ops):
    """`ops.sample` with one value, or a tensor of them, for each of its columns."""

    def run(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None, **options):
        rows = len(logits)

        def column(value, dtype):
            return value if isinstance(value, torch.Tensor) else torch.full((rows,), value, dtype=dtype)

        return ops.sample(
            logits,
            column(temperature, torch.float32),
            column(top_k, torch.int64),
            column(top_p, torch.float32),
            column(min_p, torch.float32),
            torch.arange(rows) if seeds is None else seeds,
            torch.zeros(rows, dtype=torch.int64) if positions is None else positions,
            **options,
        )

    return run


def test_splitmix64_is_the_published_generator():
    # First outputs for seed 1234567, from the reference program by Vigna.
    assert [splitmix(1234567, n) for n in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert sample_seed(1234567, 1) == 3203168211198807973
    assert sample_seed(-1, 0) == sample_seed(MASK, 0)
    assert all(-(1 << 63) <= sample_seed(7, i) < 1 << 63 for i in range(64))


@pytest.mark.parametrize("vocab", [2, 255, 256, 300, 1100])
@pytest.mark.parametrize("spread", [0.3, 4.0, 12.0])
def test_draws_are_those_of_the_definition(draw, vocab, spread):
    g = torch.Generator().manual_seed(vocab)
    rows = 24
    logits = torch.randn(rows, vocab, generator=g) * spread
    temperature = torch.tensor([0.0, 0.1, 0.7, 1.0, 1.5, 5.0]).repeat(4)
    top_k = torch.tensor([0, -1, 1, 3, 50, vocab, vocab + 5, 200]).repeat(3)
    top_p = torch.tensor([1.0, 0.5, 0.9, 0.999, 0.01]).repeat(5)[:rows]
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 1.0, 0.001]).repeat(4)[:rows]
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=g)
    positions = torch.randint(0, 10**6, (rows,), generator=g)
    before = logits.clone()
    got = draw(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds, positions=positions
    ).token_ids
    columns = (temperature, top_k, top_p, min_p, seeds, positions)
    expected = [naive_sample(row, *(c[i].item() for c in columns)) for i, row in enumerate(logits)]
    assert got.tolist() == expected
    assert torch.equal(logits, before)


def test_unfiltered_draws_are_those_of_the_definition(draw):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 600, generator=g) * torch.linspace(0, 10, 40).unsqueeze(1)
    got = draw(logits).token_ids.tolist()
    assert got == [naive_sample(row, 1.0, 0, 1.0, 0.0, i, 0) for i, row in enumerate(logits)]


@settings(max_examples=40)
@given(
    # Few distinct values: ties everywhere, also at every threshold.
    values=st.lists(st.sampled_from([-torch.inf, -1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=12),
    k=st.integers(-1, 13),
    p=st.sampled_from([1.0, 0.03, 0.35, 0.61, 0.93]),
    min_p=st.sampled_from([0.0, 0.3, 0.55, 1.0]),
)
def test_the_set_that_can_be_drawn_is_that_of_a_naive_sort(draw, values, k, p, min_p):
    row = torch.tensor(values)
    if not row.isfinite().any():
        return
    drawn = draw(row.expand(150, -1), top_k=k, top_p=p, min_p=min_p).token_ids
    allowed = {t for t in naive_survivors(row, 1.0, k, p, min_p) if row[t].isfinite()}
    assert set(drawn.tolist()) <= allowed
    weights = torch.tensor([row[t] for t in sorted(allowed)]).softmax(0)
    likely = {t for t, w in zip(sorted(allowed), weights.tolist(), strict=True) if (1 - w) ** 150 < 1e-6}
    assert likely <= set(drawn.tolist())


@pytest.mark.parametrize("what", ["seed", "position"])
def test_draws_follow_the_softmax(draw, what):
    rows = 5_000
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, -0.5, -1.0, -2.0, 0.7])
    counter = torch.arange(rows)
    fixed = torch.zeros(rows, dtype=torch.int64)
    seeds, positions = (counter, fixed) if what == "seed" else (fixed, counter)
    drawn = draw(logits.expand(rows, -1), temperature=1.3, seeds=seeds, positions=positions).token_ids
    expected = (logits.double() / 1.3).softmax(0) * rows
    statistic = ((drawn.bincount(minlength=8) - expected).square() / expected).sum().item()
    assert statistic < chi_square_limit(7)


def test_filtered_draws_follow_the_renormalised_softmax(draw):
    rows = 5_000
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, -0.5, -1.0, -2.0, 0.7])
    drawn = draw(logits.expand(rows, -1), top_k=4, top_p=0.95).token_ids
    kept = torch.tensor([0, 1, 2, 7])
    expected = logits[kept].double().softmax(0) * rows
    counts = drawn.bincount(minlength=8)
    assert counts[kept].sum() == rows
    assert ((counts[kept] - expected).square() / expected).sum().item() < chi_square_limit(3)


def test_a_draw_depends_on_seed_and_position_only(draw):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 700, generator=g) * 2
    mixed = {"temperature": torch.tensor([1.0, 0.0] * 4), "top_p": torch.tensor([0.9, 1.0, 1.0, 0.8] * 2)}
    seeds, positions = torch.arange(8) * 11, torch.arange(8) + 5
    together = draw(logits, seeds=seeds, positions=positions, **mixed).token_ids
    order = torch.randperm(8, generator=g)
    shuffled = draw(
        logits[order], seeds=seeds[order], positions=positions[order], **{k: v[order] for k, v in mixed.items()}
    ).token_ids
    assert torch.equal(shuffled, together[order])
    for i in range(8):
        row = slice(i, i + 1)
        alone = draw(
            logits[row], seeds=seeds[row], positions=positions[row], **{k: v[row] for k, v in mixed.items()}
        ).token_ids
        assert alone.item() == together[i].item()


def test_different_seeds_and_positions_give_different_draws(draw):
    logits = torch.zeros(64, 1000)
    assert len(set(draw(logits).token_ids.tolist())) > 55
    assert len(set(draw(logits, seeds=torch.zeros(64).long(), positions=torch.arange(64)).token_ids.tolist())) > 55


@pytest.mark.parametrize("vocab", [3, 256, 700])
def test_greedy_takes_the_lowest_id_of_equal_logits(draw, vocab):
    logits = torch.zeros(4, vocab)
    logits[1, vocab - 1] = 1
    logits[2, [1, vocab - 1]] = 2
    logits[3] = -torch.inf
    assert draw(logits, temperature=0.0).token_ids.tolist() == [0, vocab - 1, 1, 0]


def test_a_row_without_a_finite_logit_does_not_disturb_the_others(draw):
    logits = torch.zeros(3, 40)
    logits[0] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, 7] = 50.0
    drawn = draw(logits, top_p=0.9).token_ids
    assert drawn[2] == 7
    assert ((drawn >= 0) & (drawn < 40)).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures(draw, temperature):
    logits = torch.linspace(-5, 5, 300).repeat(20, 1)
    logits[:, 17] = -torch.inf
    drawn = draw(logits, temperature=temperature).token_ids
    assert (drawn != 17).all()
    if temperature < 1:
        assert (drawn == 299).all()
    else:
        assert len(set(drawn.tolist())) > 15


@pytest.mark.parametrize("vocab", [5, 300, 1100])
def test_logprobs_are_of_the_unscaled_unfiltered_logits(draw, vocab):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, vocab, generator=g) * 3
    raw = torch.randn(6, vocab, generator=g) * 3
    for separate, source in ((None, logits), (raw, raw)):
        out = draw(logits, temperature=0.5, top_k=2, num_logprobs=4, logprob_logits=separate)
        expected = source.double().log_softmax(-1)
        chosen = expected.gather(1, out.token_ids.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(out.logprobs.double(), chosen, atol=3e-6, rtol=1e-6)
        values, ids = expected.topk(4)
        assert torch.equal(out.top_ids, ids)
        torch.testing.assert_close(out.top_logprobs.double(), values, atol=3e-6, rtol=1e-6)
    for number in (0, None):
        none = draw(logits, num_logprobs=number)
        assert none.top_ids.shape == none.top_logprobs.shape == (6, 0)
        assert torch.equal(none.token_ids, draw(logits).token_ids)


@pytest.mark.parametrize("vocab", [12, 1100])
@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_top_logprobs_order_equal_values_by_id(draw, vocab, k):
    g = torch.Generator().manual_seed(k)
    logits = torch.randint(0, 4, (5, vocab), generator=g).float()
    logits[1] = -torch.inf
    logits[1, vocab // 2] = 0.0
    out = draw(logits, temperature=0.0, num_logprobs=k)
    expected = [sorted(range(vocab), key=lambda t, row=row: (-row[t].item(), t))[:k] for row in logits]
    assert out.top_ids.tolist() == expected
    assert torch.equal(out.top_ids[:, 0], out.token_ids)
