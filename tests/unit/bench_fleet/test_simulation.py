"""The simulator: its times are those of its parts, and a run follows from its arguments."""

import pytest

from bench.fleet.fleet import FleetPlan, Pool
from bench.fleet.simulation import Faults, simulate
from bench.load.workload import Load, Shape, conversations
from scalellm.services.executor.engine.step_time import StepTimeModel

ALPHABET = range(256, 2048)


@pytest.mark.parametrize("overlaps", [False, True])
def test_times_are_those_of_messages_and_steps(overlaps):
    steps = StepTimeModel(base=0.010, per_prefill_token=1e-4, per_decode=0.001, per_context_token=0.0)
    plan = FleetPlan((Pool(1, steps=steps, overlaps=overlaps),), num_edges=1, latency=0.001)
    planned = conversations(Shape(input_len=100, output_len=8), ALPHABET, 3, "times")
    done = simulate(plan, planned, Load(concurrency=1))
    for record in done.records:
        assert record.ttft == pytest.approx(4 * 0.001 + 0.010 + 100 * 1e-4, abs=1e-6)
        assert record.itls == [pytest.approx(0.011, abs=1e-6)] * 7


def test_an_edge_encodes_one_request_after_the_other():
    steps = StepTimeModel(base=0.001, per_prefill_token=0.0, per_decode=0.0, per_context_token=0.0)
    planned = conversations(Shape(input_len=100, output_len=1), ALPHABET, 4, "encoding")
    for num_edges, places in ((1, [1, 2, 3, 4]), (2, [1, 1, 2, 2])):
        pool = Pool(1, steps=steps, overlaps=False)
        plan = FleetPlan((pool,), num_edges=num_edges, latency=0.001, encoding=0.010)
        done = simulate(plan, planned, Load(concurrency=4))
        expected = [0.010 * place + 4 * 0.001 + 0.001 for place in places]
        assert sorted(record.ttft for record in done.records) == pytest.approx(expected, abs=1e-6)


def test_a_run_follows_from_its_arguments_and_faults_lose_nothing():
    plan = FleetPlan((Pool(4),), num_edges=2)
    planned = conversations(Shape("shared", 64, 40, prefix_len=256), ALPHABET, 40, "faults")
    faults = Faults(kills=1, drains=1, drain_limit=0.05, back_after=0.2)
    done = simulate(plan, planned, Load(rate=200.0), faults=faults)
    assert done.figures["ok"] == 40
    assert done.num_resubmitted > 0
    assert simulate(plan, planned, Load(rate=200.0), faults=faults).digest == done.digest
    assert simulate(plan, planned, Load(rate=200.0), seed="other", faults=faults).digest != done.digest


def test_a_shared_prompt_is_computed_once_where_there_is_time():
    planned = conversations(Shape("shared", 64, 4, prefix_len=1024), ALPHABET, 6, "prefix")
    done = simulate(FleetPlan((Pool(3),)), planned, Load(concurrency=1))
    assert [record.server.cached_tokens for record in done.records] == [0] + [1024] * 5
