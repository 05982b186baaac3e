"""Warm-up reaches what serving needs, leaves nothing behind."""

import pytest
import torch

import engine_kit
from runner_kit import MODEL, make_runner, random_model
from scalellm.services.executor.engine import Engine
from scalellm.services.executor.runner import FakeCudaDevice
from scalellm.services.executor.runner.decode_graphs import decode_buckets
from scalellm.services.executor.runner.warm_up import run_largest_step, warm_up


def test_buckets_cover_every_size_and_end_with_the_largest() -> None:
    for most in (1, 3, 8, 64, 100, 256, 333):
        buckets = decode_buckets(most)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == most
        for size in range(1, most + 1):
            padded = min(bucket for bucket in buckets if bucket >= size)
            assert padded - size < max(8, size / 8)
    assert len(decode_buckets(256)) < 40


def test_warm_up_leaves_an_engine_that_answers_as_a_fresh_one() -> None:
    model = random_model()
    config = engine_kit.make_config(
        vocab_size=MODEL.vocab_size, eos_token_ids=frozenset({2}), block_size=16, max_model_len=96, num_blocks=64
    )

    def answer(is_warm: bool) -> list[int]:
        device = FakeCudaDevice()
        runner = make_runner(model, config, device, capture=False)
        if is_warm:
            progress: list[str] = []
            warm_up(runner, config, progress.append)
            assert f"decode graphs {device.num_captures}/{device.num_captures}" in progress
            assert device.num_captures == len(decode_buckets(config.max_num_seqs))
        num_replays = device.num_replays
        engine = Engine(config, runner, engine_kit.SimClock())
        request = engine_kit.make_request(0, list(range(30)), max_tokens=40, temperature=0.8, ignore_eos=True)
        engine.add(request)
        tokens = engine_kit.run(engine).tokens[request.key, 0]
        assert device.num_replays - num_replays == (
            39 if is_warm else 0
        )  # the first token comes from the prompt's step
        assert runner.late_compiles == []
        return tokens

    assert answer(is_warm=True) == answer(is_warm=False)


@pytest.mark.parametrize(("max_num_batched_tokens", "max_model_len"), [(32, 96), (64, 48), (50, 20)])
def test_the_largest_step_fits_any_limits(max_num_batched_tokens: int, max_model_len: int) -> None:
    config = engine_kit.make_config(
        max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len, num_blocks=64, block_size=16
    )
    run_largest_step(random_model(), config, FakeCudaDevice(), torch.float32)
