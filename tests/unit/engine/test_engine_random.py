"""Random traffic against an oracle that knows no batches, blocks or preemption."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import engine_kit
from scalellm.services.executor.engine import (
    AbortReason,
    CapacityPolicy,
    Engine,
    EngineConfig,
    EngineRequest,
    FinishReason,
    RequestStatus,
    ResumedSample,
    ScheduledBatch,
    SwapCost,
)
from speculation_kit import DRAFTERS, make_speculator

OWN_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


def random_request(rng: random.Random, handle: int, now: float, config: EngineConfig):
    # Few distinct beginnings, so that prefixes are shared across requests.
    prefix = [rng.randrange(3)] * rng.choice((0, 4, 8, 13))
    prompt = (prefix + [rng.randrange(engine_kit.VOCAB) for _ in range(rng.randint(1, 14))])[: config.max_model_len - 1]
    n = rng.choice((1, 1, 1, 2, 3))
    request = engine_kit.make_request(
        handle,
        prompt,
        link=rng.randrange(2),
        n=n,
        seed=rng.randrange(1000),
        max_tokens=rng.choice((None, 1, 5, 20)),
        min_tokens=rng.choice((0, 0, 1)),
        stop_token_ids=frozenset(rng.sample(range(engine_kit.VOCAB), rng.choice((0, 0, 2)))),
        ignore_eos=rng.random() < 0.2,
        logprobs=rng.choice((None, None, 0)),
        prompt_logprobs=0 if rng.random() < 0.15 else None,
        priority=rng.choice((0, 0, -1, 2)),
        presence_penalty=rng.choice((0.0, 0.0, 0.0, 1.0)),  # changes nothing here but when steps are launched
        deadline=now + rng.uniform(0, 30) if rng.random() < 0.15 else None,
        cache_salt=rng.choice((b"", b"a")),
    )
    if rng.random() < 0.25:  # as if it had run elsewhere before
        resumed = []
        for index in range(n):
            output, reason = engine_kit.undisturbed(request, index, config.max_model_len)
            cut = rng.randint(0, len(output))
            ended = cut == len(output) and rng.random() < 0.5
            resumed.append(ResumedSample(index, tuple(output[:cut]), FinishReason(reason) if ended else None))
        fields = {name: getattr(request, name) for name in EngineRequest.__dataclass_fields__}
        request = EngineRequest(**(fields | {"resumed": tuple(resumed)}))
    return request


def check_against_oracle(
    collector: engine_kit.Collector, request: EngineRequest, config: EngineConfig, stopped: bool = False
) -> None:
    finish = collector.finished[request.key]
    resumed = {sample.index: sample for sample in request.resumed}
    total = 0
    for index in range(request.sampling.n):
        expected, reason = engine_kit.undisturbed(request, index, config.max_model_len)
        before = resumed[index].token_ids if index in resumed else ()
        place = (request.key, index)
        output = [*before, *collector.tokens.get(place, [])]
        total += len(output)
        assert collector.first_offset.get(place, len(before)) == len(before)
        assert output == expected[: len(output)]
        ended = resumed[index].finished if index in resumed else None
        if ended is None:
            ended = collector.samples[place].reason
        else:
            assert place not in collector.samples
        if ended in OWN_ENDS and not stopped:
            assert output == expected
            assert ended.value == reason
        if request.sampling.logprobs is not None:
            cells = engine_kit.cells_of([*request.prompt_token_ids, *output])
            first = len(request.prompt_token_ids) + len(before)
            scores = [
                engine_kit.score(cells[:p], t) for p, t in enumerate(collector.tokens.get(place, []), start=first)
            ]
            assert collector.logprobs.get(place, []) == scores
    complete = finish.status is RequestStatus.OK and not stopped and not request.resumed
    if complete and request.sampling.prompt_logprobs is not None:
        cells = engine_kit.cells_of(list(request.prompt_token_ids))
        scores = [engine_kit.score(cells[:p], t) for p, t in enumerate(request.prompt_token_ids)]
        assert collector.prompt_logprobs[request.key] == [0.0, *scores[1:]]
    assert finish.usage.prompt_tokens == len(request.prompt_token_ids)
    assert finish.usage.completion_tokens == total
    assert finish.usage.num_resumed == sum(len(sample.token_ids) for sample in request.resumed)
    timings = finish.timings
    parts = (timings.queue, timings.prefill, timings.decode)
    assert min(*parts, timings.preempted) >= 0
    assert sum(parts) <= timings.total + 1e-9


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(CapacityPolicy),
    spare_blocks=st.integers(0, 30),
    budget=st.sampled_from((8, 13, 64)),
    prefix_cache=st.booleans(),
    num_host_blocks=st.sampled_from((0, 5, 60)),
    failures=st.sampled_from((0.0, 0.0, 0.02)),
    drafter=st.sampled_from(("", *DRAFTERS)),
)
@example(  # a resumed sample, alone, gives way to its own copy-on-write: blocks are swapped out and nothing runs
    seed=3251,
    policy=CapacityPolicy.MAX_UTILIZATION,
    spare_blocks=0,
    budget=8,
    prefix_cache=True,
    num_host_blocks=60,
    failures=0.0,
    drafter="",
)
def test_random_traffic_equals_undisturbed_runs(
    overlap: engine_kit.Overlap,
    seed: int,
    policy: CapacityPolicy,
    spare_blocks: int,
    budget: int,
    prefix_cache: bool,
    num_host_blocks: int,
    failures: float,
    drafter: str,
) -> None:
    rng = random.Random(seed)
    config = engine_kit.make_config(
        num_blocks=12 + spare_blocks,
        max_model_len=48,
        max_num_seqs=rng.choice((3, 8)),
        max_num_batched_tokens=budget,
        capacity_policy=policy,
        enable_prefix_cache=prefix_cache,
        num_host_blocks=num_host_blocks,
    )
    clock = engine_kit.SimClock()

    def perhaps_fail(batch: ScheduledBatch) -> None:
        clock.advance(1.0)
        if rng.random() < failures:
            raise OSError

    runner = engine_kit.FakePagedRunner(config, overlap, on_launch=perhaps_fail, on_execute=perhaps_fail)
    speculator = make_speculator(drafter, max_model_len=config.max_model_len, seed=seed) if drafter else None
    engine = Engine(config, runner, clock, SwapCost(1, 1e9, rng.choice((0.0, 0.2))), speculator=speculator)
    collector = engine_kit.Collector()
    accepted: dict[tuple[int, int], EngineRequest] = {}
    stopped = set()
    rejected = 0
    for handle in range(25):
        for _ in range(rng.choice((0, 0, 1, 4))):
            collector.take(engine.step())
            engine.check_integrity()
        request = random_request(rng, handle, clock.now, config)
        try:
            engine.add(request)
        except ValueError:
            rejected += 1
        else:
            accepted[request.key] = request
        if accepted and rng.random() < 0.3:
            victim = rng.choice(list(accepted))
            index = rng.choice((None, None, 0, 1, 5))
            reason = rng.choice(list(AbortReason))
            if reason is AbortReason.STOP:
                stopped.add(victim)
            engine.abort(victim, index, reason)
            engine.abort(victim, index, AbortReason.CANCELLED)
        engine.check_integrity()
    if rng.random() < 0.2:
        engine.drop_link(1)
    engine_kit.run(engine, collector)

    assert set(collector.finished) == set(accepted)
    for request in accepted.values():
        check_against_oracle(collector, request, config, request.key in stopped)
    load, stats = engine.load(), engine.stats()
    assert load.free_blocks == load.total_blocks
    assert (load.running, load.waiting, load.running_sequences, load.waiting_sequences) == (0, 0, 0, 0)
    assert load.waiting_prefill_tokens == 0
    assert load.free_host_blocks == num_host_blocks
    assert [stats.swapped_out_blocks, stats.swapped_in_blocks] == runner.num_swapped
    assert (stats.accepted, stats.rejected) == (len(accepted), rejected)
    assert (stats.failed > 0) <= (stats.failed_steps > 0) <= (failures > 0)
    if policy is CapacityPolicy.GUARANTEED_NO_EVICT:
        assert stats.preemptions == 0
    if overlap is not engine_kit.Overlap.NONE:
        assert stats.draft_tokens == 0
    if drafter == "wrong":
        assert stats.accepted_tokens == 0
    assert stats.accepted_tokens == sum(finish.usage.accepted_drafts for finish in collector.finished.values())
    drafted = sum(f.usage.accepted_drafts + f.usage.rejected_drafts for f in collector.finished.values())
    assert stats.draft_tokens == drafted


@pytest.mark.parametrize("overlap", engine_kit.Overlap)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_pool_for_one_sequence_serves_many_by_preemption(prefix_cache: bool, overlap: engine_kit.Overlap) -> None:
    config = engine_kit.make_config(num_blocks=12, max_model_len=48, max_num_seqs=8, enable_prefix_cache=prefix_cache)
    engine = Engine(config, engine_kit.FakePagedRunner(config, overlap), engine_kit.SimClock())
    requests = [engine_kit.make_request(i, [i] * 6, ignore_eos=True, max_tokens=36, seed=i) for i in range(8)]
    for request in requests:
        engine.add(request)
    collector = engine_kit.run(engine)
    for request in requests:
        check_against_oracle(collector, request, config)
    assert engine.stats().preemptions > 0
    assert sum(finish.usage.num_preemptions for finish in collector.finished.values()) == engine.stats().preemptions
