"""Sequences whose cache was swapped out and in go on as if nothing had happened."""

import pytest

import engine_kit
from runner_kit import MODEL, make_runner, random_model
from scalellm.services.executor.engine import Engine, EngineConfig, SwapCost
from scalellm.services.executor.runner import CpuDevice, Device, FakeCudaDevice


def run(device: Device, num_blocks: int, num_host_blocks: int) -> tuple[dict[int, list[int]], Engine]:
    config: EngineConfig = engine_kit.make_config(
        vocab_size=MODEL.vocab_size,
        eos_token_ids=frozenset(),
        block_size=16,
        max_model_len=96,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
    )
    clock = engine_kit.SimClock()
    runner = make_runner(random_model(), config, device)
    launch = runner.launch

    def launch_and_tick(batch):
        clock.advance(0.001 + 0.01 * batch.num_prefill_tokens)
        return launch(batch)

    runner.launch = launch_and_tick
    engine = Engine(config, runner, clock, SwapCost(bytes_per_block=1, bytes_per_second=1e9))
    for handle in range(3):
        engine.add(engine_kit.make_request(handle, [handle] * 10, seed=handle, max_tokens=50, temperature=0.8))
    collector = engine_kit.run(engine)
    return {key[1]: tokens for (key, _), tokens in collector.tokens.items()}, engine


@pytest.mark.parametrize("device", [CpuDevice(), FakeCudaDevice()], ids=["cpu", "cuda"])
def test_swapping_does_not_show(device: Device) -> None:
    undisturbed, _ = run(device, num_blocks=24, num_host_blocks=0)
    swapped, engine = run(device, num_blocks=6, num_host_blocks=12)
    stats = engine.stats()
    assert stats.swaps > 0
    assert stats.swapped_in_blocks > 0
    assert swapped == undisturbed
    assert engine.load().free_host_blocks == 12
