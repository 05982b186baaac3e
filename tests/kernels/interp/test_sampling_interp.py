"""The sampler against its torch form, whose own oracle is a sort in float64 (`tests/kernels/test_sampling.py`)."""

import pytest
import torch
import triton
import triton.language as tl

from scalellm.kernels import SampleOutput, sample, sample_workspace_size, workspaces
from scalellm.kernels.reference.rng import gumbel, noise_bits, noise_keys
from scalellm.kernels.spec.draws import chi_square_limit
from scalellm.kernels.triton import noise

# Rows without a finite maximum, and temperatures next to 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def column(value, dtype, rows):
    return value if isinstance(value, torch.Tensor) else torch.full((rows,), value, dtype=dtype)


def arguments(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None):
    rows = len(logits)
    return (
        logits,
        column(temperature, torch.float32, rows),
        column(top_k, torch.int64, rows),
        column(top_p, torch.float32, rows),
        column(min_p, torch.float32, rows),
        torch.arange(rows) if seeds is None else seeds,
        torch.zeros(rows, dtype=torch.int64) if positions is None else positions,
    )


def assert_same(ops, args, **options):
    got, expected = ops.sample(*args, **options), sample(*args, **options)
    assert torch.equal(got.token_ids, expected.token_ids)
    assert torch.equal(got.top_ids, expected.top_ids)
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(got.top_logprobs, expected.top_logprobs, atol=4e-6, rtol=1e-6)
    return got


@triton.jit
def _noise(seed, position, bits_out, single, double, BLOCK: tl.constexpr):
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = noise.noise_bits(noise.noise_key(tl.load(seed), tl.load(position)), ids)
    tl.store(bits_out + ids, bits)
    tl.store(single + ids, noise.gumbel32(bits))
    tl.store(double + ids, noise.gumbel64(bits))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-1, 7), (2**63 - 1, 2**40), (-(2**63), 123456)])
def test_noise_is_that_of_the_definition(launch, seed, position):
    n = 1 << 15
    bits, single = torch.empty(n, dtype=torch.int32), torch.empty(n)
    double = torch.empty(n, dtype=torch.float64)
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    launch(_noise, (2,), seeds, positions, bits, single, double, BLOCK=n // 2)
    expected = noise_bits(noise_keys(seeds, positions), torch.arange(n))
    assert torch.equal(bits.long(), expected)
    torch.testing.assert_close(double, gumbel(expected), atol=1e-15, rtol=1e-15)
    torch.testing.assert_close(single.double(), gumbel(expected), atol=1e-6, rtol=5e-7)


@triton.jit
def _gumbel_of(bits, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, noise.gumbel32(tl.load(bits + i)))


def test_float32_noise_is_accurate_at_both_ends(launch):
    ends = torch.arange(1024)
    bits = torch.cat((ends, (1 << 23) - 512 + ends, (1 << 24) - 1024 + ends, ends * 16000)).int()
    out = torch.empty(4096)
    launch(_gumbel_of, (1,), bits, out, BLOCK=4096)
    torch.testing.assert_close(out.double(), gumbel(bits.long()), atol=1e-6, rtol=5e-7)


def thresholds(ops, launch, logits, **filters):
    """Return the survivors of each row, from the threshold that the search left in the workspace."""
    rows, vocab = logits.shape
    workspace = torch.empty(sample_workspace_size(rows, vocab), dtype=torch.int64)
    ops.sample(*arguments(logits, **filters), workspace=workspace)
    tiles = -(-vocab // workspaces.SAMPLE_TILE)
    long_size, float_size, _ = workspaces.sample_row_sizes(tiles)
    floats = workspace[rows * long_size : rows * (long_size + float_size)].view(torch.float32).view(rows, -1)
    return logits >= floats[:, 5 * tiles + workspaces.SAMPLE_CANDIDATES + 1].unsqueeze(1)


def sizes_searched(workspace, rows, vocab):
    """Return how many logits of each row went through the buffer, -1 for a search of the row itself."""
    tiles = -(-vocab // workspaces.SAMPLE_TILE)
    *before, int_size = workspaces.sample_row_sizes(tiles)
    ints = workspace[rows * sum(before) :][: rows * int_size].view(torch.int32).view(rows, -1)
    return ints[:, 2 * tiles].tolist()


def test_a_row_that_is_flat_at_its_temperature_goes_through_the_buffer(ops, monkeypatch):
    monkeypatch.setattr(workspaces, "SAMPLE_CANDIDATES", 400)
    rows, vocab = 4, 2000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5))
    logits[3] = 1.0  # nothing tells these apart
    workspace = torch.empty(sample_workspace_size(rows, vocab), dtype=torch.int64)
    temperature, top_k = torch.tensor([1.0, 1.0, 0.01, 1.0]), torch.tensor([0, 1500, 300, 0])
    top_p = torch.tensor([0.95, 1.0, 1.0, 0.95])
    ops.sample(*arguments(logits, temperature=temperature, top_k=top_k, top_p=top_p), workspace=workspace)
    *sizes, equal = sizes_searched(workspace, rows, vocab)
    assert all(0 < size <= 400 for size in sizes)
    assert equal == -1


def sorted_survivors(row, k, p):
    """Return the tokens that top-k, then top-p keep, by sorting in float64."""
    values = sorted(set(row.tolist()), reverse=True)
    kept = row.double()
    if 0 < k < len(row):
        kept = kept.masked_fill(row < row.sort(descending=True).values[k - 1], -torch.inf)
    if p < 1:
        mass = (kept - kept.max()).exp()
        bound = next((v for v in values if mass[row >= v].sum() >= p * mass.sum()), -torch.inf)
        kept = kept.masked_fill(row < bound, -torch.inf)
    return kept > -torch.inf


# With room for 8 candidates of 12 levels, nearly every search goes over the row itself; with room for 64 and no equal
# logits, most are narrowed down a second time; with 3 levels, every threshold is tied.
@pytest.mark.parametrize(("candidates", "levels"), [(4096, 3), (4096, 100000), (64, 100000), (8, 12)])
def test_the_survivors_are_those_of_a_sort(ops, launch, monkeypatch, candidates, levels):
    monkeypatch.setattr(workspaces, "SAMPLE_CANDIDATES", candidates)
    g = torch.Generator().manual_seed(levels)
    rows, vocab = 8, 1100
    logits = (torch.rand(rows, vocab, generator=g) * levels).round() * (8 / levels) - 3
    top_k = torch.tensor([0, 1, 7, 0, 1099, 40, 1100, 13])
    top_p = torch.tensor([0.9, 1.0, 1.0, 0.03, 1.0, 0.35, 0.99, 0.2])
    got = thresholds(ops, launch, logits, top_k=top_k, top_p=top_p)
    for i in range(rows):
        expected = sorted_survivors(logits[i], int(top_k[i]), float(top_p[i]))
        assert torch.equal(got[i], expected), i


def test_draws_follow_the_filtered_softmax(ops):
    rows = 40
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, -0.5, -1.0, -2.0, 0.7])
    drawn = ops.sample(*arguments(logits.expand(rows, -1).contiguous(), top_k=4, top_p=0.95)).token_ids
    kept = torch.tensor([0, 1, 2, 7])
    counts = drawn.bincount(minlength=8)
    assert counts[kept].sum() == rows
    expected = logits[kept].double().softmax(0) * rows
    assert ((counts[kept] - expected).square() / expected).sum().item() < chi_square_limit(3)


def test_noise_of_a_vocabulary_follows_the_softmax(launch):
    """Chi-square where each draw is over tokens of its own: 4096 draws of 8 tokens from one row's noise."""
    n = 1 << 15
    seeds, positions, double = torch.tensor([5]), torch.tensor([9]), torch.empty(n, dtype=torch.float64)
    bits, single = torch.empty(n, dtype=torch.int32), torch.empty(n)
    launch(_noise, (2,), seeds, positions, bits, single, double, BLOCK=n // 2)
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, -0.5, -1.0, -2.0, 0.7])
    counts = (logits + single.view(-1, 8)).argmax(1).bincount(minlength=8)
    expected = logits.double().softmax(0) * (n // 8)
    assert ((counts - expected).square() / expected).sum().item() < chi_square_limit(7)


def test_a_draw_depends_on_its_own_row_only(ops):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 1100, generator=g) * 2
    temperature, top_p = torch.tensor([1.0, 0.0] * 3), torch.tensor([0.9, 1.0, 1.0, 0.8, 0.7, 1.0])
    seeds, positions = torch.arange(6) * 11, torch.arange(6) + 5

    def drawn(order):
        options = {"temperature": temperature[order], "top_p": top_p[order]}
        args = arguments(logits[order], seeds=seeds[order], positions=positions[order], **options)
        return ops.sample(*args, num_logprobs=2)

    together = drawn(torch.arange(6))
    order = torch.randperm(6, generator=g)
    for got, expected in zip(drawn(order), together, strict=True):
        assert torch.equal(got, expected[order])
    for got, expected in zip(drawn(torch.tensor([4])), together, strict=True):
        assert torch.equal(got[0], expected[4])


@pytest.mark.parametrize("vocab", [3, 1100])
def test_greedy_takes_the_lowest_id_of_equal_logits(ops, vocab):
    logits = torch.zeros(4, vocab)
    logits[1, vocab - 1] = 1
    logits[2, [1, vocab - 1]] = 2
    logits[3] = -torch.inf
    out = ops.sample(*arguments(logits, temperature=0.0))
    assert out.token_ids.tolist() == [0, vocab - 1, 1, 0]


def test_a_row_without_a_finite_maximum_does_not_disturb_the_others(ops):
    logits = torch.zeros(4, 40)
    logits[0] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, 7] = 50.0
    logits[3, 5] = torch.inf
    out = ops.sample(*arguments(logits, top_p=0.9))
    assert out.token_ids.tolist()[1:] == [3, 7, 5]
    assert 0 <= out.token_ids[0] < 40
    assert out.logprobs[2] == 0


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures(ops, temperature):
    logits = torch.linspace(-5, 5, 300).repeat(6, 1)
    logits[:, 17] = -torch.inf
    top_k = torch.tensor([0, 0, 5, 5, 299, 0])
    top_p = torch.tensor([1.0, 0.9, 1.0, 0.5, 0.9, 0.3])
    drawn = ops.sample(*arguments(logits, temperature=temperature, top_k=top_k, top_p=top_p)).token_ids
    assert (drawn != 17).all()
    if temperature < 1:
        assert (drawn == 299).all()
    else:
        assert (drawn[2:4] >= 295).all()


@pytest.mark.parametrize("vocab", [12, 1100])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_top_logprobs_order_equal_values_by_id(ops, vocab, k):
    g = torch.Generator().manual_seed(k)
    logits = torch.randint(0, 4, (5, vocab), generator=g).float()
    logits[1] = -torch.inf
    logits[1, vocab // 2] = 0.0
    logits[2] = torch.where(logits[2] > 1, -0.0, logits[2])
    out = assert_same(ops, arguments(logits, temperature=0.0), num_logprobs=k)
    expected = [sorted(range(vocab), key=lambda t, row=row: (-row[t].item(), t))[:k] for row in logits]
    assert out.top_ids.tolist() == expected


def test_results_go_into_out_and_scratch_into_the_workspace(ops):
    wide = torch.full((3, 3000), torch.nan)
    logits = wide[:, 1000:2100].copy_(torch.randn(3, 1100, generator=torch.Generator().manual_seed(0)))
    workspace = torch.full((sample_workspace_size(3, 1100, 2),), -1)
    out = SampleOutput(
        torch.full((3,), -7), torch.full((3,), torch.nan), torch.full((3, 2), -7), torch.full((3, 2), torch.nan)
    )
    args = arguments(logits, top_k=20, top_p=0.8)
    assert ops.sample(*args, num_logprobs=2, workspace=workspace, out=out) is out
    for got, expected in zip(out, sample(*args, num_logprobs=2), strict=True):
        torch.testing.assert_close(got, expected, atol=4e-6, rtol=1e-6)


def test_an_empty_batch(ops):
    column, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    out = ops.sample(torch.zeros(0, 300), column, none, column, column, none, none, num_logprobs=2)
    assert out.token_ids.shape == (0,)
    assert out.top_ids.shape == (0, 2)
