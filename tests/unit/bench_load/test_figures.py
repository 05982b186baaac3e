"""Figures against numpy, and against counting by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.compare import compare_text, differences, ratios
from bench.load.figures import Slo, breakdown_ms, latencies_ms, spread, summarise
from bench.load.meter import GeneratorUse
from bench.load.records import Ended, RequestRecord

TIMES = st.lists(st.floats(0, 1e4), min_size=1, max_size=200)


def record(sent=0.0, arrivals=(1.0, 2.0, 4.0), ended=5.0, status="ok", **more):
    return RequestRecord(
        0, 0, 10, 3, due=sent, sent=sent, ended=ended, arrivals=list(arrivals), counts=[1] * len(arrivals),
        status=status, **more,
    )  # fmt: skip


@given(TIMES)
def test_percentiles_are_numpys(values):
    found = spread(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    for rank in (50, 90, 99):
        assert found[f"p{rank}"] == pytest.approx(np.quantile(values, rank / 100))
    assert found["max"] == max(values)


def test_latencies_of_one_request():
    found = latencies_ms([record(sent=0.5), record(status="failed"), record(status="cancelled")])
    assert found == {"ttft": [500.0], "tpot": [1500.0], "itl": [1000.0, 2000.0], "e2e": [4500.0]}


def test_tpot_counts_tokens_and_not_messages():
    one = record(server=Ended(output_tokens=7))  # the first message had one
    assert one.tpot == pytest.approx(3.0 / 6)


def test_rates_are_over_what_ended_well():
    records = [
        record(),
        record(sent=1.0, ended=9.0, server=Ended(prompt_tokens=12, output_tokens=5, cached_tokens=4)),
        record(sent=2.0, ended=10.0, status="failed", kind="UNAVAILABLE"),
        record(sent=5.0, ended=6.0, status="cancelled"),
    ]
    figures = summarise(records)
    assert (figures["sent"], figures["ok"], figures["failed"], figures["cancelled"]) == (4, 2, 1, 1)
    assert figures["failures"] == {"UNAVAILABLE": 1}
    assert figures["duration_s"] == 10.0
    assert figures["input_tokens"] == 22
    assert figures["output_tokens"] == 8
    assert figures["tokens_lost"] == 6
    assert figures["output_throughput"] == pytest.approx(0.8)
    assert figures["request_throughput"] == pytest.approx(0.2)
    assert figures["peak_in_flight"] == 3
    assert figures["goodput"] is None
    json.dumps(figures)


@pytest.mark.parametrize(
    ("slo", "is_good"),
    [
        ("ttft:1000", True),
        ("ttft:999", False),
        ("itl:2000", True),
        ("itl:1999", False),  # one of its gaps is longer
        ("tpot:1500,e2e:5000", True),
        ("ttft:1000,itl:2000,e2e:4999", False),
    ],
)
def test_goodput_counts_what_keeps_all_limits(slo, is_good):
    records = [record(), record(status="failed"), record(arrivals=(), ended=0.1)]
    limits = Slo.parse(slo)
    figures = summarise(records, limits)
    # The last was not streamed: what was not measured meets no limit on it.
    assert figures["good_requests"] == int(is_good)
    assert figures["goodput"] == pytest.approx(int(is_good) / 5.0)


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:0", "ttft:nan", "speed:3", "ttft:1;itl:2"])
def test_other_limits_are_refused(text):
    with pytest.raises(ValueError, match="is no limit"):
        Slo.parse(text)


def test_breakdown_is_the_mean_and_what_only_the_client_saw():
    parts = {"total": 2_000_000_000, "prefill": 1_500_000_000, "decode": 500_000_000}
    found = breakdown_ms([record(server=Ended(breakdown=parts)), record()])
    assert found == {"total": 2000.0, "prefill": 1500.0, "decode": 500.0, "client": 3000.0}
    assert breakdown_ms([record()]) is None


def test_a_record_survives_json():
    one = record(sent=0.25, kind="x", server=Ended(1, 2, 3, {"total": 4}))
    assert RequestRecord.from_json(json.loads(json.dumps(one.as_json()))) == one


def test_a_generator_that_cannot_keep_up_says_so():
    assert GeneratorUse(0.5, 5.0, 100.0, 1.0).warnings() == []
    assert ["CPU" in warning for warning in GeneratorUse(0.9, 25.0, 100.0, 1.0).warnings()] == [True, False]


def _run(load, scale, prompts="p"):
    one = record(sent=0.0, arrivals=(scale, 2 * scale), ended=3 * scale)
    step = {"load": load, "prompts": prompts, "figures": summarise([one]), "warnings": []}
    return {"target": "t", "model": "m", "options": {"seed": 0}, "steps": [step]}


def test_comparison_prints_ratios_and_says_what_differs():
    first, second = _run("8", 1.0), _run("8", 2.0)
    found = ratios(first, second)["8"]
    assert found["ttft_ms.p50"] == pytest.approx((1000.0, 2000.0, 2.0))
    assert found["output_throughput"][2] == pytest.approx(0.5)
    assert differences(first, second) == []
    assert "2.000" in compare_text(first, second)

    other = _run("8", 1.0, prompts="q") | {"options": {"seed": 1}}
    assert [difference.split(":")[0] for difference in differences(first, other)] == ["seed differs", "8"]
    assert ratios(first, _run("9", 1.0)) == {}
    assert differences(first, _run("9", 1.0)) == ["8: only the first run has this load"]
