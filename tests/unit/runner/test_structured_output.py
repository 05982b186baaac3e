"""Answers of a given shape, over a tiny random model that would write anything."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jsonschema
import pytest
from llguidance import LLExecutor, LLMatcher

import engine_kit
from bench.hostile_grammars import HOSTILE
from engine_kit import Collector
from grammar_kit import EOS, ids_of, json_grammar, make_compiler, steps, text_of
from runner_kit import MODEL, make_runner, random_model
from scalellm.services.executor.engine import (
    AbortReason,
    Engine,
    EngineRequest,
    FinishReason,
    GrammarError,
    InvalidRequestError,
    RequestStatus,
    ResumedSample,
)
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.executor.models import CausalLM
from scalellm.services.executor.runner import CpuDevice, Device

SCHEMAS = [
    '{"type": "object", "required": ["a", "b"], "additionalProperties": false, "properties": '
    '{"a": {"type": "integer", "minimum": -9, "maximum": 99}, "b": {"type": "string", "maxLength": 5}}}',
    '{"type": "array", "maxItems": 3, "items": {"enum": ["red", "green", 3, null, true]}}',
    '{"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-f]{2,4}$"}]}',
    '{"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "additionalProperties": false, "properties": '
    '{"v": {"type": "boolean"}, "n": {"$ref": "#/$defs/t"}}}}}',
]


def json_of(schema: str) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        jsonschema.validate(json.loads(text), json.loads(schema))
        return True

    return check


KINDS: list[tuple[str, Callable[[str], Any]]] = [
    *((json_grammar(schema), json_of(schema)) for schema in SCHEMAS),
    (r"start: /[a-c]+[0-9]{2,5}/", re.compile(r"[a-c]+[0-9]{2,5}").fullmatch),
    ('start: "yes" | "no" | "not at all"', ("yes", "no", "not at all").__contains__),
    ('start: "(" start ")" | "x"', re.compile(r"(\(*)x(\)*)").fullmatch),
]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model()


@pytest.fixture(scope="module")
def compiler() -> Iterator[LlGrammarCompiler]:
    made = make_compiler()
    yield made
    made.close()


def make_engine(
    model: CausalLM, compiler: Any, device: Device | None = None, clock: Any = time.monotonic, **changes: object
) -> Engine:
    settings = {"block_size": 16, "max_model_len": 96, "num_blocks": 96, "max_num_seqs": 24, **changes}
    config = engine_kit.make_config(
        vocab_size=MODEL.vocab_size, eos_token_ids=frozenset(MODEL.eos_token_ids), **settings
    )
    return Engine(config, make_runner(model, config, device or CpuDevice()), clock, grammars=compiler)


def run(engine: Engine, requests: Sequence[EngineRequest]) -> Collector:
    for request in requests:
        engine.add(request)
    collector = Collector()
    for result in steps(engine):
        collector.take(result)
        engine.check_integrity()
    return collector


@pytest.fixture(scope="module")
def calm(model: CausalLM, compiler: LlGrammarCompiler) -> Callable[[EngineRequest], dict[int, list[int]]]:
    """The tokens of each sample of a request that is alone, computed once."""
    known: dict[tuple[Any, ...], dict[int, list[int]]] = {}

    def alone(request: EngineRequest) -> dict[int, list[int]]:
        key = (request.grammar, request.prompt_token_ids, repr(request.sampling))
        if key not in known:
            tokens = run(make_engine(model, compiler), [request]).tokens
            known[key] = {index: tokens[request.key, index] for index in range(request.sampling.n)}
        return known[key]

    return alone


def ask(handle: int, grammar: str, prompt: str = "Say", **changes: Any) -> EngineRequest:
    fields = {"temperature": 2.0, "max_tokens": 40, "seed": handle, **changes}
    return engine_kit.make_request(handle, ids_of(prompt), grammar=grammar, **fields)


def mixed(draw: random.Random, count: int = 9) -> list[EngineRequest]:
    """Requests with and without a grammar, side by side; handle i has the grammar KINDS[i % (len(KINDS) + 2)]."""
    grammars = [*(grammar for grammar, _ in KINDS), "", ""]
    return [
        ask(
            handle,
            grammars[handle % len(grammars)],
            "p" * draw.randint(1, 30),
            n=draw.randint(1, 2),
            top_k=draw.choice((0, 40)),
        )
        for handle in range(count)
    ]


def assert_of_its_shape(collector: Collector, request: EngineRequest) -> list[FinishReason]:
    """Each sample that is complete has its shape. Returns how they ended."""
    checks = dict(KINDS)
    reasons = []
    for index in range(request.sampling.n):
        place = (request.key, index)
        finish = collector.samples[place]
        reasons.append(finish.reason)
        if finish.reason is FinishReason.STOP:
            *token_ids, last = collector.tokens[place]
            assert last == finish.stop_token_id == EOS
            assert checks[request.grammar](text_of(token_ids)), text_of(token_ids)
        else:
            assert finish.reason is FinishReason.LENGTH
            assert len(collector.tokens[place]) == request.sampling.max_tokens
    return reasons


def test_complete_answers_have_their_shape_and_neighbours_are_what_they_are_alone(
    model, compiler, device, calm
) -> None:
    requests = mixed(random.Random(1))
    together = run(make_engine(model, compiler, device), requests)
    reasons = []
    for request in requests:
        assert together.finished[request.key].status is RequestStatus.OK
        if request.grammar:
            reasons += assert_of_its_shape(together, request)
        for index, token_ids in calm(request).items():
            assert together.tokens[request.key, index] == token_ids
    assert reasons.count(FinishReason.STOP) > len(reasons) / 2


def test_preempted_samples_go_on_as_if_nothing_had_happened(model, compiler, device, calm) -> None:
    requests = mixed(random.Random(1))
    tight = make_engine(model, compiler, device, num_blocks=8)
    disturbed = run(tight, requests)
    assert tight.stats().preemptions > 2
    for request in requests:
        for index, token_ids in calm(request).items():
            assert disturbed.tokens[request.key, index] == token_ids


@pytest.mark.parametrize("taken", [1, 4])
def test_samples_that_ran_elsewhere_go_on(model, compiler, device, calm, taken: int) -> None:
    moved, rests = [], {}
    for number, (grammar, _) in enumerate(KINDS):
        whole = calm(ask(number, grammar, n=2))
        resumed = [ResumedSample(index, tuple(ids[:taken])) for index, ids in whole.items() if len(ids) > taken]
        moved.append(request := ask(number, grammar, n=2, resumed=tuple(resumed)))
        rests |= {(request.key, sample.index): whole[sample.index][taken:] for sample in resumed}
    result = run(make_engine(model, compiler, device), moved)
    assert len(rests) > 4
    for place, rest in rests.items():
        assert result.tokens[place] == rest


def test_an_answer_that_is_too_short_says_so(model, compiler) -> None:
    request = ask(1, KINDS[0][0], max_tokens=4)
    assert run(make_engine(model, compiler), [request]).samples[request.key, 0].reason is FinishReason.LENGTH


def test_the_end_comes_when_nothing_else_can(model, compiler, device) -> None:
    """min_tokens and ignore_eos put the end off, and no further than the grammar goes."""
    grammar = "start: /a{2,9}/"
    for changes, length in (({"min_tokens": 6}, range(6, 10)), ({"min_tokens": 30}, [9]), ({"ignore_eos": True}, [9])):
        requests = [ask(seed, grammar, **changes) for seed in range(5)]
        result = run(make_engine(model, compiler, device), requests)
        for request in requests:
            *token_ids, last = result.tokens[request.key, 0]
            assert (text_of(token_ids), last) == ("a" * len(token_ids), EOS)
            assert len(token_ids) in length
            assert result.samples[request.key, 0].reason is FinishReason.STOP


def test_stop_tokens_end_a_sample_where_the_grammar_allows_them(model, compiler) -> None:
    (stop,) = ids_of("b")
    request = ask(1, "start: /[ab]{20}/", stop_token_ids=frozenset({stop}), min_tokens=3)
    result = run(make_engine(model, compiler), [request])
    finish = result.samples[request.key, 0]
    token_ids = result.tokens[request.key, 0]
    assert (finish.reason, finish.stop_token_id, token_ids[-1]) == (FinishReason.STOP, stop, stop)
    assert token_ids.index(stop) == len(token_ids) - 1 >= 3


def test_bias_and_penalties_choose_among_what_the_grammar_allows(model, compiler, device) -> None:
    a, b, c = ids_of("abc")
    biased = ask(1, "start: /[ab]{9}/", logit_bias={a: -100.0, c: 100.0})
    penalised = ask(2, "start: /[ab]{9}/", temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.9)
    plain = ask(3, "start: /[ab]{9}/", temperature=0.0)
    result = run(make_engine(model, compiler, device), [biased, penalised, plain])
    assert result.tokens[biased.key, 0] == [b] * 9 + [EOS]
    assert set(result.tokens[penalised.key, 0]) == {a, b, EOS}
    assert result.tokens[penalised.key, 0] != result.tokens[plain.key, 0]


def test_log_probabilities_are_the_models_own(model, compiler, device) -> None:
    grammar = "start: /[ab]{9}/"
    shaped = run(make_engine(model, compiler, device), [ask(1, grammar, logprobs=2)])
    token_ids = shaped.tokens[(0, 1), 0]
    # The same tokens as a prompt are scored without any grammar.
    scored = engine_kit.make_request(2, [*ids_of("Say"), *token_ids], prompt_logprobs=0, max_tokens=1)
    free = run(make_engine(model, compiler, device), [scored])
    assert free.prompt_logprobs[scored.key][3:] == pytest.approx(shaped.logprobs[(0, 1), 0], abs=1e-4)


def test_what_is_no_grammar_ends_its_own_request(model, compiler, device) -> None:
    bad = [ask(0, "start: nothing"), ask(1, "start: /(?=a)b/"), ask(2, 'start: %json {"not": {}}'), ask(3, "")]
    good = ask(4, KINDS[5][0])
    result = run(make_engine(model, compiler, device), [*bad, good])
    for request in bad[:3]:
        finish = result.finished[request.key]
        assert finish.status is RequestStatus.INVALID
        assert finish.message
        assert len(finish.message) < 500
        assert not result.tokens[request.key, 0]
    assert result.finished[good.key].status is result.finished[bad[3].key].status is RequestStatus.OK


def test_a_text_that_the_vocabulary_cannot_write_ends_the_request_and_says_so(model, compiler, device) -> None:
    request, good = ask(1, 'start: "aé"'), ask(2, KINDS[5][0])
    result = run(make_engine(model, compiler, device), [request, good])
    finish = result.finished[request.key]
    assert finish.status is RequestStatus.INVALID
    assert "no token of the model's vocabulary" in finish.message
    assert result.finished[good.key].status is RequestStatus.OK


def test_tokens_from_elsewhere_that_do_not_fit_end_the_request(model, compiler) -> None:
    request = ask(1, "start: /a{9}/", resumed=(ResumedSample(0, tuple(ids_of("ab"))),))
    result = run(make_engine(model, compiler), [request])
    assert result.finished[request.key].status is RequestStatus.INVALID


def test_a_grammar_that_becomes_too_much_ends_its_own_request(model, compiler, device, calm) -> None:
    engine = make_engine(model, compiler, device)
    for request in (bad := ask(1, "start: /a{50}/"), good := ask(2, KINDS[4][0]), free := ask(3, "")):
        engine.add(request)
    collector, broken = Collector(), False
    while engine.has_unfinished():
        collector.take(engine.step())
        if len(collector.tokens[bad.key, 0]) == 5 and not broken:
            (seq,) = engine._books.get(bad.key).samples
            seq.matcher.matcher.consume_token(ids_of("b")[0])  # it is in error from here on
            broken = True
        engine.check_integrity()
    finish = collector.finished[bad.key]
    assert (finish.status, len(collector.tokens[bad.key, 0]) < 9) == (RequestStatus.INVALID, True)
    for request in (good, free):
        assert collector.tokens[request.key, 0] == calm(request)[0]


def test_hostile_grammars_end_at_their_limits_and_neighbours_go_on(model, compiler, calm) -> None:
    good, free = ask(100, KINDS[0][0]), ask(101, "")
    hostile = [ask(handle, grammar, max_tokens=8) for handle, grammar in enumerate(HOSTILE.values())]
    result = run(make_engine(model, compiler), [*hostile, good, free])
    for name, request in zip(HOSTILE, hostile, strict=True):
        finish = result.finished[request.key]
        assert finish.status in (RequestStatus.OK, RequestStatus.INVALID), name
        assert bool(finish.message) == (finish.status is RequestStatus.INVALID)
    for request in (good, free):
        assert result.tokens[request.key, 0] == calm(request)[0]


def test_steps_compile_nothing_and_fill_all_masks_by_one_call(model, monkeypatch) -> None:
    compiled_by: list[str] = []
    calls: list[int] = []

    def compiled(*args: Any, **options: Any) -> LLMatcher:
        compiled_by.append(threading.current_thread().name)
        return LLMatcher(*args, **options)

    class Executor:
        def __init__(self) -> None:
            self.inner = LLExecutor()

        def unsafe_compute_mask_ptr(self, pairs: list[Any], *rest: int) -> None:
            calls.append(len(pairs))
            self.inner.unsafe_compute_mask_ptr(pairs, *rest)

    monkeypatch.setattr("scalellm.services.executor.grammar.compiler.LLMatcher", compiled)
    monkeypatch.setattr("scalellm.services.executor.grammar.masks.LLExecutor", Executor)
    monkeypatch.setattr("scalellm.services.executor.grammar.matcher._NUM_TO_PROVE", 0)  # all masks within steps
    fresh = make_compiler()
    engine = make_engine(model, fresh)
    hostile = [HOSTILE[name] for name in ("deep", "recursive", "large enum", "ambiguous")]
    run(engine, [ask(handle, grammar, max_tokens=8) for handle, grammar in enumerate([*hostile, *hostile, ""])])
    fresh.close()
    assert len(compiled_by) == len(hostile)
    assert all(name.startswith("grammar") for name in compiled_by)
    assert max(calls) > 1
    assert len(calls) <= engine.stats().steps


class _Endless:
    """A compiler that is never done."""

    def __init__(self) -> None:
        self.num_cancelled = 0
        self.is_done = False

    def start(self, grammar: str, outputs: Sequence[Sequence[int]]) -> _Endless:
        return self

    def matchers(self) -> Sequence[Any]:
        raise GrammarError("it never was one")

    def cancel(self) -> None:
        self.num_cancelled += 1


def test_a_request_whose_grammar_takes_long_holds_up_nobody_and_can_end(model) -> None:
    endless, clock = _Endless(), engine_kit.SimClock()
    engine = make_engine(model, endless, clock=clock)
    for handle in range(4):
        engine.add(ask(handle, "start: /a/", n=2, deadline=clock.now + 5 if handle == 2 else None))
    assert engine.only_awaits_grammars
    engine.add(free := ask(9, ""))
    assert not engine.only_awaits_grammars
    collector = Collector()
    while free.key not in collector.finished:
        collector.take(engine.step())
        engine.check_integrity()
    assert engine.only_awaits_grammars
    engine.abort((0, 0), None, AbortReason.CANCELLED)
    engine.abort((0, 1), 0, AbortReason.STOP)
    engine.abort((0, 1), 1, AbortReason.STOP)
    clock.advance(6)
    collector.take(engine.step())
    engine.give_back((0, 3), "later")
    collector.take(engine.step())
    statuses = [collector.finished[0, handle].status.value for handle in range(4)]
    assert statuses == ["cancelled", "ok", "deadline_exceeded", "moved"]
    assert (endless.num_cancelled, engine.has_unfinished()) == (4, False)
    engine.check_integrity()


def test_an_engine_without_a_tokenizer_refuses_grammars(model) -> None:
    engine = make_engine(model, None)
    assert not engine.takes_grammars
    with pytest.raises(InvalidRequestError, match="structured_output"):
        engine.add(ask(1, "start: /a/"))
