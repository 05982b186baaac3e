"""SamplingParams, cache sizing and the FakeModelRunner."""

from pathlib import Path

import pytest

import engine_kit
from scalellm.services.executor.engine import (
    STEP_TIME_PRESETS,
    Engine,
    FakeModelRunner,
    InvalidRequestError,
    KVCacheTooSmallError,
    SamplingParams,
    num_kv_blocks,
)
from scalellm.services.executor.memory import free_memory

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", NAN),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("logit_bias", {50: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: NAN}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("stop_token_ids", frozenset({50})),
        ("stop_token_ids", frozenset(range(65))),
        ("seed", 2**64),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value}).validate(vocab_size=50, max_logprobs=20)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_edges_of_every_range_are_accepted() -> None:
    SamplingParams().validate(50, 20)
    SamplingParams(
        n=1,
        max_tokens=1,
        min_tokens=1,
        temperature=0.0,
        top_k=2**32 - 1,
        top_p=1.0,
        min_p=1.0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=2.0,
        logit_bias={49: -100.0, 0: 100.0},
        seed=2**64 - 1,
        stop_token_ids=frozenset({0, 49}),
        logprobs=20,
        prompt_logprobs=0,
    ).validate(50, 20)


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"at most max_tokens \(2\), got 3"):
        SamplingParams(max_tokens=2, min_tokens=3).validate(50, 20)


def blocks(**changes: object) -> int:
    values = {
        "bytes_per_token": 100,
        "block_size": 16,
        "max_model_len": 64,
        "free_bytes": 16_000,
        "memory_fraction": 0.5,
    }
    return num_kv_blocks(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "cache"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ],
)
def test_a_container_s_limit_counts(tmp_path: Path, limit: str, used: str, statistics: str, cache: str) -> None:
    unlimited = free_memory(tmp_path)
    assert unlimited > 2**20
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text(f"{2**20}\n")
    (tmp_path / used).write_text("700000\n")
    assert free_memory(tmp_path) == 2**20 - 700000
    (tmp_path / statistics).write_text(f"anon 1\n{cache} 200000\n")
    assert free_memory(tmp_path) == 2**20 - 500000
    (tmp_path / used).write_text(f"{2**21}\n")
    assert free_memory(tmp_path) == 0


def test_blocks_come_from_free_memory_or_are_set() -> None:
    assert blocks() == 5
    assert blocks(num_blocks=10) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 81}, r"memory_fraction \(0.5\) .* holds 5 KV-cache blocks \(80 tokens\).*takes 6 blocks"),
        ({"max_model_len": 81}, "lower max_model_len to at most 80, or raise memory_fraction"),
        ({"num_blocks": 3}, r"num_blocks \(3\) holds 48 tokens, one sequence of max_model_len \(64\) takes 4 blocks"),
        ({"num_blocks": 11}, r"num_blocks \(11\) takes .* are free: set num_blocks to at most 10"),
    ],
)
def test_too_little_memory_says_what_to_change(changes: dict[str, object], message: str) -> None:
    with pytest.raises(KVCacheTooSmallError, match=message):
        blocks(**changes)


def test_fake_tokens_follow_the_script_and_avoid_special_ones() -> None:
    config = engine_kit.make_config(max_model_len=64)
    runner = FakeModelRunner(engine_kit.VOCAB, range(30), STEP_TIME_PRESETS["instant"])
    engine = Engine(config, runner, engine_kit.SimClock())
    engine.add(engine_kit.make_request(0, [1, 2, 3], logprobs=1, prompt_logprobs=1))
    collector = engine_kit.run(engine)
    tokens = [1, 2, 3]
    while len(tokens) < 64:
        tokens.append(runner.next_token(tokens[-1], len(tokens)))
    assert collector.tokens[(0, 0), 0] == tokens[3:]
    assert set(tokens[3:]) <= set(range(30, engine_kit.VOCAB))
    assert len(set(tokens[3:])) > 5
    assert collector.logprobs[(0, 0), 0] == [0.0] * 61
    assert collector.prompt_logprobs[0, 0] == [0.0] * 3
    with pytest.raises(ValueError, match="leave no token"):
        FakeModelRunner(5, range(5), STEP_TIME_PRESETS["instant"])


def test_the_h200_preset_is_the_roofline() -> None:
    """Milliseconds of Llama-3.1-8B in bf16: one and 64 sequences at 1024 tokens, and 1024 prefill tokens."""
    for num_seqs, expected in ((1, 3.5), (64, 5.7)):
        clock = engine_kit.SimClock()
        config = engine_kit.make_config(
            num_blocks=64 * 300, max_model_len=1200, max_num_seqs=64, max_num_batched_tokens=1024
        )
        runner = FakeModelRunner(engine_kit.VOCAB, [], STEP_TIME_PRESETS["h200-llama-8b"], sleep=clock.advance)
        engine = Engine(config, runner, clock)
        for handle in range(num_seqs):
            prompt = [handle % engine_kit.VOCAB] * 1024
            engine.add(engine_kit.make_request(handle, prompt, link=handle, max_tokens=100, ignore_eos=True))
        before = clock.now
        engine.step()
        assert (clock.now - before) * 1e3 == pytest.approx(20.1, rel=0.02)
        while engine.load().waiting or engine.load().waiting_prefill_tokens:
            engine.step()
        engine.step()
        before = clock.now
        assert len(engine.step().tokens) == num_seqs
        assert (clock.now - before) * 1e3 == pytest.approx(expected, rel=0.05)
