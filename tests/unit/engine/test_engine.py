"""The engine's promises to its callers: ends, refusals, deadlines, credits, failures, moves."""

import dataclasses
from collections.abc import Callable

import pytest

import engine_kit
from engine_kit import EOS, VOCAB
from scalellm.services.executor.engine import (
    STEP_TIME_PRESETS,
    AbortReason,
    Engine,
    EngineConfigError,
    FakeModelRunner,
    FinishReason,
    InvalidRequestError,
    RequestStatus,
    ResumedSample,
    SampledBatch,
    ScheduledBatch,
)


class Script:
    """Answers with a list of tokens per handle, in order; then with token 1."""

    def __init__(self, tokens: dict[int, list[int]] | None = None, *, overlaps: bool) -> None:
        self.tokens = tokens or {}
        self.overlaps = overlaps
        self.launch_error: Exception | None = None
        self.wait_error: Exception | None = None
        self.clock = engine_kit.SimClock()
        self._fake = FakeModelRunner(VOCAB, [EOS], STEP_TIME_PRESETS["instant"])

    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        raise AssertionError("there are no host blocks")

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        self._fake.copy_blocks(pairs)

    def check_device(self) -> None:
        self._fake.check_device()

    def launch(self, batch: ScheduledBatch) -> "ScriptedStep":
        if self.launch_error is not None:
            error, self.launch_error = self.launch_error, None
            raise error
        sampled = self._fake.launch(batch).wait()
        sampled.token_ids = [
            script[s.num_output_tokens] if s.num_output_tokens < len(script) else 1
            for s in batch.sequences
            if s.samples
            for script in [self.tokens.get(s.seq.group.key[1], [])]
        ]
        return ScriptedStep(self, sampled)


@dataclasses.dataclass
class ScriptedStep:
    script: Script
    sampled: SampledBatch

    def draw(self) -> None:
        """Do nothing: no sample has a grammar."""

    def wait(self) -> SampledBatch:
        self.script.clock.advance(1.0)
        if self.script.wait_error is not None:
            error, self.script.wait_error = self.script.wait_error, None
            raise error
        return self.sampled


Start = Callable[..., tuple[Engine, Script]]


@pytest.fixture(params=(False, True), ids=("one at a time", "overlapped"))
def start(request: pytest.FixtureRequest) -> Start:
    def start(tokens: dict[int, list[int]] | None = None, **changes: object) -> tuple[Engine, Script]:
        script = Script(tokens, overlaps=request.param)
        return Engine(engine_kit.make_config(**changes), script, script.clock), script

    return start


def one(
    start: Start, tokens: list[int], prompt: int = 3, **params: object
) -> tuple[list[int], FinishReason, int | None]:
    engine, _ = start({0: tokens})
    engine.add(engine_kit.make_request(0, [1] * prompt, **params))
    collector = engine_kit.run(engine)
    finish = collector.samples[(0, 0), 0]
    return collector.tokens[(0, 0), 0], finish.reason, finish.stop_token_id


@pytest.mark.parametrize(
    ("params", "output", "reason", "stop_token"),
    [
        ({}, [5, 6, EOS], FinishReason.STOP, EOS),
        ({"ignore_eos": True, "max_tokens": 4}, [5, 6, EOS, 9], FinishReason.LENGTH, None),
        ({"stop_token_ids": frozenset({6})}, [5, 6], FinishReason.STOP, 6),
        ({"ignore_eos": True, "stop_token_ids": frozenset({EOS})}, [5, 6, EOS], FinishReason.STOP, EOS),
        ({"max_tokens": 2}, [5, 6], FinishReason.LENGTH, None),
        ({"max_tokens": 3}, [5, 6, EOS], FinishReason.STOP, EOS),
        ({"prompt": 62}, [5, 6], FinishReason.LENGTH, None),  # max_model_len is 64
        ({"prompt": 62, "max_tokens": 50}, [5, 6], FinishReason.LENGTH, None),
    ],
)
def test_stop_conditions(
    start: Start, params: dict[str, object], output: list[int], reason: FinishReason, stop_token: int | None
) -> None:
    assert one(start, [5, 6, EOS, 9, 9, 9], **params) == (output, reason, stop_token)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"prompt": []}, "prompt", "at least one token"),
        ({"prompt": [1] * 64}, "prompt", "max_model_len is 64 tokens, so a prompt may have at most 63"),
        ({"prompt": [1, VOCAB]}, "prompt", f"between 0 and {VOCAB - 1}"),
        ({"prompt": [1, -1]}, "prompt", f"between 0 and {VOCAB - 1}"),
        ({"n": 9}, "n", r"at most max_num_seqs \(8\), got 9"),
        ({"n": 0}, "n", r"in \[1, 16\], got 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"resumed": (ResumedSample(1, ()),)}, "resumed", "sample 1 is not one of 0..0"),
        ({"resumed": (ResumedSample(0, ()), ResumedSample(0, ()))}, "resumed", "each once"),
        ({"resumed": (ResumedSample(0, (1,) * 6),), "max_tokens": 5}, "resumed", "at most 5"),
        ({"resumed": (ResumedSample(0, (VOCAB,)),)}, "resumed", f"between 0 and {VOCAB - 1}"),
        ({"prediction_token_ids": (1, VOCAB)}, "prediction_token_ids", f"between 0 and {VOCAB - 1}"),
    ],
)
def test_refusals_name_field_and_limit(start: Start, changes: dict[str, object], field: str, message: str) -> None:
    engine, _ = start()
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine.add(engine_kit.make_request(0, **({"prompt": [1]} | changes)))
    assert caught.value.field == field
    assert engine.stats().rejected == 1
    assert engine.stats().accepted == 0
    assert not engine.has_unfinished()


def test_a_key_in_use_is_refused_and_free_again_afterwards(start: Start) -> None:
    engine, _ = start({0: [EOS]})
    engine.add(engine_kit.make_request(0, [1]))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(engine_kit.make_request(0, [1]))
    engine_kit.run(engine)
    assert not engine.has_request((0, 0))
    engine.add(engine_kit.make_request(0, [1]))
    assert engine.has_request((0, 0))


def test_a_deadline_ends_the_request_at_the_next_step_and_frees_everything(start: Start) -> None:
    engine, script = start()
    engine.add(engine_kit.make_request(0, [1] * 9, n=2, deadline=script.clock.now + 3.5))
    engine.add(engine_kit.make_request(1, [1] * 9, deadline=script.clock.now - 1, max_tokens=2))
    engine.add(engine_kit.make_request(2, [1] * 9, deadline=script.clock.now + 1e9, max_tokens=2))
    collector = engine_kit.run(engine)
    statuses = {key[1]: finish.status for key, finish in collector.finished.items()}
    assert statuses == {
        0: RequestStatus.DEADLINE_EXCEEDED,
        1: RequestStatus.DEADLINE_EXCEEDED,
        2: RequestStatus.OK,
    }
    assert collector.samples[(0, 0), 1].reason is FinishReason.DEADLINE
    assert len(collector.tokens[(0, 0), 0]) == 4
    assert not collector.tokens[(0, 1), 0]
    assert engine.load().free_blocks == engine.load().total_blocks
    assert engine.stats().deadline_exceeded == 2


def test_a_stop_string_ends_its_sample_and_the_last_one_ends_the_request(start: Start) -> None:
    engine, script = start()
    collector = engine_kit.Collector()
    engine.add(engine_kit.make_request(0, [1] * 5, n=2))
    for _ in range(3 + script.overlaps):
        collector.take(engine.step())
    engine.abort((0, 0), 1, AbortReason.STOP)
    engine.abort((0, 0), 1, AbortReason.STOP)
    collector.take(engine.step())
    assert collector.samples[(0, 0), 1].reason is FinishReason.STOP
    assert not collector.finished
    engine.abort((0, 0), 0, AbortReason.STOP)
    engine_kit.run(engine, collector)
    assert collector.finished[0, 0].status is RequestStatus.OK
    assert collector.finished[0, 0].usage.completion_tokens == 4 + 2 - script.overlaps


def test_aborting_at_every_state_frees_everything(start: Start) -> None:
    num_steps = 8 if start()[1].overlaps else 6
    for when in range(num_steps + 1):
        for index in (None, 0, 1):
            engine, _ = start(max_num_batched_tokens=8)
            collector = engine_kit.Collector()
            engine.add(engine_kit.make_request(0, [1] * 20, n=2, max_tokens=3, ignore_eos=True))
            for _ in range(when):
                collector.take(engine.step())
            engine.abort((0, 0), index)
            engine.check_integrity()
            engine_kit.run(engine, collector)
            finish = collector.finished[0, 0]
            all_cancelled = {sample.reason for sample in collector.samples.values()} == {FinishReason.CANCELLED}
            assert (finish.status is RequestStatus.CANCELLED) == (all_cancelled or (index is None and when < num_steps))
            assert engine.load().free_blocks == engine.load().total_blocks
    engine.abort((5, 5))
    engine.abort((0, 0), 3)
    assert not engine.has_unfinished()


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(start: Start) -> None:
    engine, script = start(max_num_seqs=1)
    for handle in range(2):
        engine.add(engine_kit.make_request(handle, [handle] * 9, max_tokens=4))
    engine.step()
    script.wait_error = MemoryError("secret path")
    result = engine.step()
    assert isinstance(result.error, MemoryError)
    assert [(f.key, f.status, f.message) for f in result.finished] == [
        ((0, 0), RequestStatus.INTERNAL, "the model runner failed (MemoryError)")
    ]
    assert result.samples_finished[0].reason is FinishReason.ERROR
    engine.check_integrity()
    collector = engine_kit.run(engine)
    assert collector.finished[0, 1].status is RequestStatus.OK
    assert engine.load().free_blocks == engine.load().total_blocks
    stats = engine.stats()
    assert (stats.failed, stats.failed_steps, stats.finished) == (1, 1, 1)


def test_credits_count_what_left_waiting_per_link(start: Start) -> None:
    engine, script = start({handle: [EOS] for handle in range(9)}, max_num_seqs=1)
    engine.add(engine_kit.make_request(0, [1] * 10, link=1))
    engine.add(engine_kit.make_request(1, [1] * 20, link=2))
    engine.add(engine_kit.make_request(2, [1] * 5, link=2))

    def credits() -> list[tuple[int, int]]:
        return [dataclasses.astuple(engine.link_credits(link)) for link in (1, 2, 3)]

    assert credits() == [(0, 0), (0, 0), (0, 0)]
    assert engine.load().waiting_prefill_tokens == 35
    for _ in range(1 + script.overlaps):
        engine.step()
    assert credits() == [(10, 1), (0, 0), (0, 0)]
    engine.abort((2, 2))
    assert credits() == [(10, 1), (5, 1), (0, 0)]
    for _ in range(1 + script.overlaps):
        engine.step()
    assert credits() == [(10, 1), (25, 2), (0, 0)]
    assert engine.load().waiting_prefill_tokens == 0


def test_a_dropped_link_loses_its_requests_only(start: Start) -> None:
    engine, _ = start()
    for handle in range(4):
        engine.add(engine_kit.make_request(handle, [1] * 9, link=handle % 2, max_tokens=3))
    engine.step()
    engine.drop_link(1)
    engine.drop_link(7)
    collector = engine_kit.run(engine)
    statuses = {key: finish.status for key, finish in collector.finished.items()}
    assert statuses == {
        (0, 0): RequestStatus.OK,
        (1, 1): RequestStatus.CANCELLED,
        (0, 2): RequestStatus.OK,
        (1, 3): RequestStatus.CANCELLED,
    }
    assert engine.link_credits(1).completed_requests == 0


@pytest.mark.parametrize(
    ("tokens", "ended", "reason"),
    [
        ((5, EOS), None, FinishReason.STOP),
        ((5, 6, 8), None, FinishReason.LENGTH),
        ((5, EOS), FinishReason.STOP, None),
    ],
)
def test_a_request_moved_after_its_last_token_ends_without_running(
    start: Start, tokens: tuple[int, ...], ended: FinishReason | None, reason: FinishReason | None
) -> None:
    engine, _ = start()
    engine.add(engine_kit.make_request(0, [1] * 4, max_tokens=3, resumed=(ResumedSample(0, tokens, ended),)))
    collector = engine_kit.run(engine)
    assert collector.finished[0, 0].status is RequestStatus.OK
    assert [finish.reason for finish in collector.samples.values()] == ([] if reason is None else [reason])
    assert engine.stats().steps == 0


def test_prefix_hits_are_counted_and_prompt_logprobs_recompute(start: Start) -> None:
    engine, _ = start({handle: [EOS] for handle in range(9)})
    for handle, params in enumerate(({}, {}, {"prompt_logprobs": 0}, {"cache_salt": b"other"})):
        engine.add(engine_kit.make_request(handle, list(range(8, 22)), **params))
        collector = engine_kit.run(engine)
        assert collector.finished[0, handle].usage.cached_tokens == (12 if handle == 1 else 0)
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (4 * 14, 12)
    assert len(engine_kit.run(engine).prompt_logprobs) == 0


def test_a_second_turn_computes_only_what_is_new(start: Start) -> None:
    engine, script = start({0: [9] * 8, 1: [EOS]})
    engine.add(engine_kit.make_request(0, [3] * 9, max_tokens=8))
    engine_kit.run(engine)
    computed = engine.stats().computed_tokens
    engine.add(engine_kit.make_request(1, [3] * 9 + [9] * 8 + [4] * 3))
    collector = engine_kit.run(engine)
    assert collector.finished[0, 1].usage.cached_tokens == 16
    assert engine.stats().computed_tokens - computed == 4 + script.overlaps  # a stop is seen a step late


def test_timings_add_up(start: Start) -> None:
    engine, script = start({0: [5] * 9}, max_num_seqs=1)
    engine.add(engine_kit.make_request(0, [1] * 4, max_tokens=3))
    engine.add(engine_kit.make_request(1, [1] * 4, max_tokens=2))
    script.clock.advance(10.0)
    collector = engine_kit.run(engine)
    first, second = collector.finished[0, 0].timings, collector.finished[0, 1].timings
    assert (first.queue, first.prefill, first.decode, first.total) == (10.0, 1.0, 2.0, 13.0)
    assert (second.queue, second.prefill, second.decode, second.total) == (13.0, 1.0, 1.0, 15.0)


def test_without_a_seed_requests_differ() -> None:
    config = engine_kit.make_config()
    engine = Engine(config, engine_kit.FakePagedRunner(config), engine_kit.SimClock())
    for handle in range(2):
        engine.add(engine_kit.make_request(handle, [1] * 4, seed=None, max_tokens=20, ignore_eos=True))
    collector = engine_kit.run(engine)
    assert collector.tokens[(0, 0), 0] != collector.tokens[(0, 1), 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 15}, r"hold 60 tokens, fewer than max_model_len \(64\)"),
        ({"max_num_batched_tokens": 7}, r"must be at least max_num_seqs \(8\)"),
        ({"target_itl": 0.0}, "target_itl must be above 0"),
        ({"max_model_len": 1}, "max_model_len must hold a prompt and an output token"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        engine_kit.make_config(**changes)
