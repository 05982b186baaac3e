"""Faults of the grammars' compiler itself: they end one request, and the engine goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import pytest

import engine_kit
from scalellm.services.executor.engine import (
    Compilation,
    Engine,
    EngineRequest,
    InvalidRequestError,
    Matcher,
    RequestStatus,
)
from scalellm.services.executor.grammar import compiler


class Broken(Compilation):
    """Done from the beginning, with an error that no grammar should lead to."""

    is_done = True

    def matchers(self) -> Sequence[Matcher]:
        raise OSError("out of threads")

    def cancel(self) -> None:
        """Nothing is under way."""


class BrokenCompiler:
    """A compiler that fails at one of two places."""

    def start(self, grammar: str, outputs: Sequence[Sequence[int]]) -> Broken:
        if grammar == "fails at once":
            raise RuntimeError("can't start new thread")
        return Broken()


@pytest.fixture
def engine() -> Engine:
    config = engine_kit.make_config()
    runner = engine_kit.FakePagedRunner(config)
    return Engine(config, runner, engine_kit.SimClock(), grammars=BrokenCompiler())


def make_request(handle: int, grammar: str = "", attempt: int = 0) -> EngineRequest:
    return engine_kit.make_request(handle, [1, 2], n=2, grammar=grammar, execution_id=b"x" * 16, attempt=attempt)


def check_goes_on(engine: Engine) -> None:
    other = engine_kit.make_request(9, [1, 2, 3], max_tokens=4)
    engine.add(other)
    collector = engine_kit.run(engine)
    assert collector.tokens[other.key, 0] == engine_kit.undisturbed(other, 0, 64)[0]
    load = engine.load()
    assert (load.free_blocks, load.running, load.waiting) == (load.total_blocks, 0, 0)
    engine.drop_link(0)
    engine.check_integrity()


def test_a_compilation_that_ends_with_any_error_ends_its_request(engine: Engine, caplog) -> None:
    engine.add(make_request(1, "fails later"))
    with caplog.at_level(logging.ERROR):
        collector = engine_kit.run(engine)
    finish = collector.finished[0, 1]
    assert (finish.status, finish.message) == (RequestStatus.INVALID, "the grammar could not be compiled (OSError)")
    (record,) = caplog.records
    assert "out of threads" in str(record.exc_info)
    assert record.request_id == "r1"
    check_goes_on(engine)


def test_a_compilation_that_cannot_even_start_refuses_its_request(engine: Engine, caplog) -> None:
    engine.add(make_request(1))
    with caplog.at_level(logging.ERROR), pytest.raises(InvalidRequestError) as refused:
        engine.add(make_request(2, "fails at once", attempt=1))
    assert str(refused.value) == "structured_output: the grammar could not be compiled (RuntimeError)"
    assert len(caplog.records) == 1
    assert not engine.has_request((0, 2))
    assert (engine.stats().accepted, engine.stats().rejected) == (1, 1)
    engine.check_integrity()
    check_goes_on(engine)


def test_a_panic_of_the_library_is_an_error_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panic(*_: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(compiler, "_make_tokenizer", panic)
    made = compiler.LlGrammarCompiler(None, ())
    compilation = made.start("start: /a/", [()])
    while not compilation.is_done:
        time.sleep(1e-3)
    made.close()
    with pytest.raises(RuntimeError, match="PanicException: index out of bounds"):
        compilation.matchers()
