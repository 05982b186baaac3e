"""Several attempts to run one request, as they come by way of several schedulers."""

import pytest

import engine_kit
from scalellm.services.executor.engine import Engine, InvalidRequestError, RequestStatus, SupersededError


def make_engine(overlap: engine_kit.Overlap) -> Engine:
    config = engine_kit.make_config()
    return Engine(config, engine_kit.FakePagedRunner(config, overlap), engine_kit.SimClock())


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
def test_of_the_attempts_to_run_a_request_the_latest_runs_alone(overlap: engine_kit.Overlap) -> None:
    engine = make_engine(overlap)
    name = {"execution_id": b"x" * 16, "max_tokens": 6}
    other = engine_kit.make_request(1, [1], link=9, execution_id=b"y" * 16, max_tokens=6)
    engine.add(engine_kit.make_request(1, [1], link=1, attempt=1, **name))
    engine.add(other)
    collector = engine_kit.Collector()
    for _ in range(3):
        collector.take(engine.step())
    with pytest.raises(SupersededError, match="attempt 0 of this request is out of date, attempt 1 runs"):
        engine.add(engine_kit.make_request(1, [1], link=2, attempt=0, **name))
    engine.add(engine_kit.make_request(1, [1], link=3, attempt=1, **name))  # the same number: the newer one
    engine.add(engine_kit.make_request(1, [1], link=4, attempt=2, **name))
    engine_kit.run(engine, collector)
    assert {key[0]: finish.status for key, finish in collector.finished.items()} == {
        1: RequestStatus.SUPERSEDED,
        3: RequestStatus.SUPERSEDED,
        4: RequestStatus.OK,
        9: RequestStatus.OK,
    }
    assert collector.tokens[(4, 1), 0] == collector.tokens[other.key, 0]
    engine.add(engine_kit.make_request(1, [1], link=5, attempt=0, **name))  # nothing is kept of what ended
    assert engine_kit.run(engine).finished[5, 1].status is RequestStatus.OK
    stats = engine.stats()
    assert (stats.accepted, stats.finished, stats.cancelled, stats.rejected) == (5, 3, 2, 1)
    assert engine.load().free_blocks == engine.load().total_blocks


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
def test_an_attempt_that_is_invalid_ends_nothing(overlap: engine_kit.Overlap) -> None:
    engine = make_engine(overlap)
    engine.add(engine_kit.make_request(0, [1], execution_id=b"x", max_tokens=2))
    with pytest.raises(InvalidRequestError):
        engine.add(engine_kit.make_request(1, [engine_kit.VOCAB], execution_id=b"x", attempt=1))
    assert engine_kit.run(engine).finished[0, 0].status is RequestStatus.OK
