"""The line of step times: what it was made from comes out again."""

import random
from types import SimpleNamespace

import pytest

from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.fake_model_runner import FakeModelRunner
from scalellm.services.executor.engine.step_time import StepTimeFit, StepTimeModel
from scalellm.services.executor.engine.step_warm_up import fit_step_times

TRUE = StepTimeModel(base=4e-3, per_prefill_token=20e-6, per_decode=30e-6, per_context_token=50e-9)
SLOWER = StepTimeModel(base=8e-3, per_prefill_token=40e-6, per_decode=60e-6, per_context_token=100e-9)


def batch(rng, *, max_rows=64, prompts=True):
    starts = [rng.randint(1, 4000) for _ in range(rng.randint(0, max_rows))]
    tokens = rng.choice([0, 0, rng.randint(1, 2000)]) if prompts else 0
    sequences = [SimpleNamespace(start=start) for start in starts]
    return SimpleNamespace(sequences=sequences, num_decodes=len(starts), num_prefill_tokens=tokens)


def observe(fit, line, count, rng, noise=0.05, **shape):
    for _ in range(count):
        step = batch(rng, **shape)
        fit.observe(step, line.seconds(step) * rng.uniform(1 - noise, 1 + noise))


def assert_predicts(found, line, rng, tolerance, **shape):
    for _ in range(100):
        step = batch(rng, **shape)
        assert found.seconds(step) == pytest.approx(line.seconds(step), rel=tolerance)


def test_steps_are_predicted():
    rng, fit = random.Random(1), StepTimeFit()
    assert fit.line() is None
    observe(fit, TRUE, 2000, rng)
    assert_predicts(fit.line(), TRUE, rng, 0.05)


def test_a_line_follows_what_changes():
    rng, fit = random.Random(2), StepTimeFit()
    observe(fit, TRUE, 4000, rng)
    observe(fit, SLOWER, 12_000, rng)
    assert_predicts(fit.line(), SLOWER, rng, 0.05)


def test_what_steps_do_not_vary_by_stays_as_it_was():
    rng, fit = random.Random(3), StepTimeFit()
    observe(fit, TRUE, 4000, rng)
    fit.line()
    observe(fit, TRUE, 400, rng, prompts=False)
    assert fit.line().per_prefill_token == pytest.approx(TRUE.per_prefill_token, rel=0.1)


def test_no_figure_is_below_zero():
    rng, fit = random.Random(4), StepTimeFit()
    for _ in range(200):
        step = batch(rng)
        fit.observe(step, rng.uniform(0.0, 0.01) / (1 + step.num_decodes))
    line = fit.line()
    assert min(line.base, line.per_prefill_token, line.per_decode, line.per_context_token) >= 0.0


@pytest.mark.parametrize("overlaps", [False, True])
def test_an_engine_is_measured_before_it_serves(overlaps):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    config = EngineConfig(
        num_blocks=4096,
        max_model_len=4096,
        vocab_size=100,
        eos_token_ids=frozenset({0}),
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    )
    runner = FakeModelRunner(100, {0}, TRUE, sleep, lambda: now[0], overlaps=overlaps)
    found = fit_step_times(config, runner, lambda: now[0]).line()
    assert_predicts(found, TRUE, random.Random(5), 0.1, max_rows=64)
