"""Requests that leave an engine and go on in another one, or later in the same."""

import dataclasses

import pytest

import engine_kit
from scalellm.services.executor.engine import AbortReason, Engine, FinishReason, RequestStatus, ResumedSample


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
def test_a_moved_request_goes_on_where_it_was(overlap: engine_kit.Overlap) -> None:
    config = engine_kit.make_config()
    request = engine_kit.make_request(0, [3] * 11, n=3, seed=5, max_tokens=12, ignore_eos=True)
    first = Engine(config, engine_kit.FakePagedRunner(config, overlap), engine_kit.SimClock())
    first.add(request)
    before = engine_kit.Collector()
    for _ in range(5):
        before.take(first.step())
    first.abort(request.key, 2, AbortReason.STOP)
    before.take(first.step())

    emitted = {index: tuple(before.tokens[request.key, index]) for index in range(3)}
    num_emitted = [6, 5, 4] if overlap is engine_kit.Overlap.NONE else [5, 3, 2]
    assert [len(tokens) for tokens in emitted.values()] == num_emitted
    moved = dataclasses.replace(
        request,
        resumed=tuple(
            ResumedSample(index, tokens, FinishReason.STOP if index == 2 else None) for index, tokens in emitted.items()
        ),
    )
    second = Engine(config, engine_kit.FakePagedRunner(config, overlap), engine_kit.SimClock())
    second.add(moved)
    after = engine_kit.run(second)
    for index in (0, 1):
        whole = [*emitted[index], *after.tokens[request.key, index]]
        assert whole == engine_kit.undisturbed(request, index, 64)[0]
        assert after.first_offset[request.key, index] == len(emitted[index])
    assert (request.key, 2) not in after.tokens
    assert (request.key, 2) not in after.samples
    usage = after.finished[request.key].usage
    assert (usage.completion_tokens, usage.num_resumed) == (12 + 12 + num_emitted[2], sum(num_emitted))


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
def test_a_request_that_is_given_back_at_any_time_goes_on_as_if_nothing_had_happened(
    overlap: engine_kit.Overlap,
) -> None:
    config = engine_kit.make_config(max_num_batched_tokens=8)
    request = engine_kit.make_request(0, [3] * 20, n=2, seed=5, max_tokens=6, ignore_eos=True)
    for when in range(12):
        engine = Engine(config, engine_kit.FakePagedRunner(config, overlap), engine_kit.SimClock())
        engine.add(request)
        before = engine_kit.Collector()
        for _ in range(when):
            before.take(engine.step())
        engine.give_back(request.key, "taken back")
        engine.give_back(request.key, "it is gone already")
        engine_kit.run(engine, before)
        finish = before.finished[request.key]
        ended = {index: sample.reason for (_, index), sample in before.samples.items()}
        if finish.status is RequestStatus.OK:
            assert ended == dict.fromkeys(range(2), FinishReason.LENGTH)
            continue
        assert (finish.status, finish.message) == (RequestStatus.MOVED, "taken back")
        assert set(ended.values()) <= {FinishReason.LENGTH}
        assert engine.load().free_blocks == engine.load().total_blocks
        assert engine.stats().cancelled == 1
        emitted = {index: tuple(before.tokens[request.key, index]) for index in range(2)}
        resumed = tuple(ResumedSample(index, tokens, ended.get(index)) for index, tokens in emitted.items())
        engine.add(dataclasses.replace(request, resumed=resumed))
        after = engine_kit.run(engine)
        for index in range(2):
            whole = [*emitted[index], *after.tokens[request.key, index]]
            assert whole == engine_kit.undisturbed(request, index, 64)[0]
        assert after.finished[request.key].status is RequestStatus.OK
    assert finish.status is RequestStatus.OK, "it ran to its end before the last time"
