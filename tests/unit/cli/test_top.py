"""Figures from two scrapes."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile_text import HOSTILE, harmful_in
from scalellm.cli.output import Terminal
from scalellm.cli.scraping import read_samples
from scalellm.cli.scraping import scrape as scrape_all
from scalellm.cli.top import frame
from scalellm.services.common.metric_window import Scrape, Window, increase, quantile, rate


def scrape(at: float, **samples: dict[str, float]) -> Scrape:
    """Samples by name and value of the label `le`, or `` for one without."""
    return Scrape(
        "a:1",
        at,
        {name: {(("le", le),) if le else (): value for le, value in of.items()} for name, of in samples.items()},
    )


def test_a_counter_that_begins_anew_counts_from_zero() -> None:
    old, new = scrape(0.0, x_total={"": 100.0}), scrape(2.0, x_total={"": 130.0})
    assert (increase(old, new, "x_total"), rate(old, new, "x_total")) == (30.0, 15.0)
    assert increase(old, scrape(2.0, x_total={"": 7.0}), "x_total") == 7.0
    assert increase(Scrape("a:1", 0.0), new, "x_total") == 0.0, "what it did before it was first seen is no news"


def test_quantiles_are_those_of_what_happened_in_between() -> None:
    old = scrape(0.0, h_bucket={"0.1": 50.0, "0.2": 50.0, "0.4": 50.0, "+Inf": 50.0})
    new = scrape(1.0, h_bucket={"0.1": 50.0, "0.2": 60.0, "0.4": 70.0, "+Inf": 70.0})
    assert math.isclose(quantile([(old, new)], "h", 0.5), 0.2)
    assert math.isclose(quantile([(old, new)], "h", 0.75), 0.3)
    assert math.isnan(quantile([(old, old)], "h", 0.5))
    beyond = scrape(1.0, h_bucket={"0.1": 50.0, "0.2": 50.0, "0.4": 50.0, "+Inf": 60.0})
    assert quantile([(old, beyond)], "h", 0.5) == 0.4, "beyond the last bound nothing is known"


TOKENIZER = """\
# TYPE scalellm_build_info gauge
scalellm_build_info{service="tokenizer",version="1"} 1
# TYPE scalellm_tokenizer_scheduler_links gauge
scalellm_tokenizer_scheduler_links 1
# TYPE scalellm_process_cpu_seconds counter
scalellm_process_cpu_seconds_total 2.5
# TYPE scalellm_process_resident_memory_bytes gauge
scalellm_process_resident_memory_bytes 1.048576e+08
# TYPE scalellm_tokenizer_requests_running gauge
scalellm_tokenizer_requests_running 3
# TYPE scalellm_tokenizer_requests_ended counter
scalellm_tokenizer_requests_ended_total{outcome="finished",code="OK"} 7
# TYPE scalellm_tokenizer_requests_sent counter
scalellm_tokenizer_requests_sent_total{scheduler="s:1"} 5
scalellm_tokenizer_requests_sent_total{scheduler="s:2"} 2
# TYPE scalellm_tokenizer_scheduler_requests gauge
scalellm_tokenizer_scheduler_requests{scheduler="s:1"} 3
scalellm_tokenizer_scheduler_requests{scheduler="s:2"} 0
# TYPE scalellm_tokenizer_requests_resubmitted counter
scalellm_tokenizer_requests_resubmitted_total{reason="lost"} 1
# TYPE scalellm_time_to_first_token_seconds histogram
scalellm_time_to_first_token_seconds_bucket{le="0.1"} 5
scalellm_time_to_first_token_seconds_bucket{le="+Inf"} 7
scalellm_time_to_first_token_seconds_count 7
scalellm_time_to_first_token_seconds_sum 1.5
"""
SCHEDULER = """\
# TYPE scalellm_build_info gauge
scalellm_build_info{service="scheduler"} 1
# TYPE scalellm_scheduler_executors gauge
scalellm_scheduler_executors{phase="ready"} 1
# TYPE scalellm_scheduler_redis_up gauge
scalellm_scheduler_redis_up 1
# TYPE scalellm_scheduler_num_requests_waiting gauge
scalellm_scheduler_num_requests_waiting 0
"""
EXECUTOR = """\
# TYPE scalellm_build_info gauge
scalellm_build_info{service="executor"} 1
# TYPE scalellm_executor_engine_up gauge
scalellm_executor_engine_up 1
# TYPE scalellm_executor_kv_cache_usage_perc gauge
scalellm_executor_kv_cache_usage_perc 0.5
# TYPE scalellm_executor_num_requests_running gauge
scalellm_executor_num_requests_running 2
# TYPE scalellm_executor_num_requests_waiting gauge
scalellm_executor_num_requests_waiting 0
# TYPE scalellm_executor_step_seconds histogram
scalellm_executor_step_seconds_bucket{le="0.01"} 5
scalellm_executor_step_seconds_bucket{le="+Inf"} 5
# TYPE scalellm_executor_preemptions counter
scalellm_executor_preemptions_total 4
"""


def shown(old: Sequence[str], new: Sequence[str]) -> str:
    """A frame of services with these expositions."""

    def scrapes(expositions: Sequence[str], at: float) -> list[Scrape]:
        found = []
        for number, exposition in enumerate(expositions):
            try:
                found.append(Scrape(f"a:{number}", at, read_samples(exposition)))
            except ValueError:
                found.append(Scrape(f"a:{number}", at))
        return found

    console = Terminal(file=(stream := io.StringIO()), width=1000)
    console.print(frame(Window(scrapes(old, 0.0), scrapes(new, 1.0))))
    assert harmful_in(stream.getvalue()) == []
    assert max(map(len, stream.getvalue().splitlines())) < 500
    return stream.getvalue()


HEALTHY = (TOKENIZER, SCHEDULER, EXECUTOR)


def test_a_frame_tells_where_requests_go() -> None:
    later = TOKENIZER.replace('sent_total{scheduler="s:2"} 2', 'sent_total{scheduler="s:2"} 6')
    later = later.replace('{reason="lost"} 1', '{reason="lost"} 5')
    found = lines(shown(HEALTHY, (later, SCHEDULER, EXECUTOR)))
    start = found.index("sent to run req/s")
    assert found[start : start + 3] == ["sent to run req/s", "s:1 3 0.0", "s:2 0 4.0"]
    assert "sent again 4.0 as a scheduler was lost, 0.0 as one drains per second" in found


def lines(frame: str) -> list[str]:
    """The lines without their layout."""
    return [" ".join(line.split()) for line in frame.splitlines()]


def test_a_frame_tells_which_executors_new_requests_go_to() -> None:
    pools = "".join(
        f"# TYPE scalellm_scheduler_pool_{name} gauge\n"
        f'scalellm_scheduler_pool_{name}{{tensor_parallel="1"}} {small}\n'
        f'scalellm_scheduler_pool_{name}{{tensor_parallel="8"}} {large}\n'
        for name, small, large in (
            ("executors", 8, 1),
            ("running", 0, 3),
            ("chosen", 0, 1),
            ("predicted_seconds", 0.542, 0.214),
        )
    )
    found = shown((TOKENIZER, SCHEDULER + pools, EXECUTOR), (TOKENIZER, SCHEDULER + pools, EXECUTOR))
    rows = [line.split() for line in found.splitlines()]
    assert ["a:1", "1", "8", "0", "542.0", "ms"] in rows
    assert ["a:1", "8", "1", "3", "214.0", "ms", "here"] in rows
    assert "devices each" not in shown(HEALTHY, HEALTHY)


def test_a_frame_tells_which_executor_has_which_model() -> None:
    info = '# TYPE scalellm_executor_info gauge\nscalellm_executor_info{model="%s"} 1\n'
    one, two = (EXECUTOR + info % name for name in ("smollm2", "gemma3"))
    found = lines(shown((TOKENIZER, SCHEDULER, one, two), (TOKENIZER, SCHEDULER, one, two)))
    start = next(number for number, line in enumerate(found) if line.startswith("executor model run wait"))
    assert [line.split()[:3] for line in found[start + 1 : start + 3]] == [
        ["a:2", "smollm2", "2"],
        ["a:3", "gemma3", "2"],
    ]
    of_one = (TOKENIZER, SCHEDULER, one, one)
    assert "executor model" not in "".join(lines(shown(of_one, of_one)))


def test_a_frame_of_healthy_services() -> None:
    found = lines(shown(HEALTHY, HEALTHY))
    assert "requests 3 running, 0 waiting" in found
    assert "per second 0.0 finished, 0.0 cancelled, 0.0 rejected" in found, "what never happened is 0"
    assert "tokenizer a:0 ok 0 % 100 MiB" in found


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("_requests_running 3", "_requests_running NaN"), "requests - running, 0 waiting"),
        (("scalellm_tokenizer_requests_running", "renamed"), "requests - running, 0 waiting"),
        (("scalellm_process_resident_memory_bytes", "renamed"), "tokenizer a:0 ok 0 % -"),
        (("_total 2.5", "_total +Inf"), "tokenizer a:0 ok - 100 MiB"),
        (("_links 1", "_links NaN"), "tokenizer a:0 no link to the scheduler 0 % 100 MiB"),
        (('service="tokenizer"', 'service="gateway"'), "gateway a:0 is no service of ScaleLLM 0 % 100 MiB"),
        (('service="tokenizer",', ""), "? a:0 is no service of ScaleLLM 0 % 100 MiB"),
        (("# TYPE", "}{ nonsense\n# TYPE"), "? a:0 does not answer - -"),
    ],
)
def test_what_cannot_be_told_is_a_dash(change: tuple[str, str], line: str) -> None:
    changed = (TOKENIZER.replace(*change), SCHEDULER, EXECUTOR)
    assert line in lines(shown(changed, changed))


@pytest.mark.parametrize("usage", ["NaN", "-Inf", "1e300", "-7", "2e9"])
def test_a_bar_stays_a_bar(usage: str) -> None:
    executor = EXECUTOR.replace("usage_perc 0.5", f"usage_perc {usage}")
    assert len(shown(HEALTHY, (TOKENIZER, SCHEDULER, executor))) < 2000


KINDS = ("drop", "twice", "NaN", "+Inf", "-Inf", "-1", "1e308", "2e9", "x", "", "label", "text")
TEXTS = st.text(max_size=8) | st.just(HOSTILE.replace("\n", "\\n"))


def mutated(line: str, kind: str, text: str) -> str:
    """A line of an exposition with something wrong in it."""
    match kind:
        case "drop":
            return ""
        case "twice":
            return line + line
        case "label":
            return re.sub(r'="[^"]*"', lambda _: f'="{text}"', line)
        case "text":
            return line[: len(line) // 2] + text + line[len(line) // 2 :]
    return f"{line.rpartition(' ')[0]} {kind}\n"


@given(
    changes=st.lists(st.tuples(st.integers(0), st.sampled_from(KINDS), TEXTS), min_size=1, max_size=6),
    is_old=st.booleans(),
)
def test_no_exposition_ends_in_a_traceback(changes: list[tuple[int, str, str]], is_old: bool) -> None:
    expositions = [exposition.splitlines(keepends=True) for exposition in HEALTHY]
    for place, kind, text in changes:
        exposition = expositions[place % 3]
        index = place // 3 % len(exposition)
        exposition[index] = mutated(exposition[index], kind, text)
    changed = ["".join(exposition) for exposition in expositions]
    shown(changed if is_old else HEALTHY, changed)


def test_an_endless_exposition_is_not_read() -> None:
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(64):
                    self.wfile.write(b"a_total 1\n" * 100_000)
                    sent.append(1)

        def log_message(self, *_: object) -> None:
            pass

    sent: list[int] = []
    with HTTPServer(("127.0.0.1", 0), Endless) as server, ThreadPoolExecutor(1) as pool:
        served = pool.submit(server.handle_request)
        (found,) = scrape_all([f"127.0.0.1:{server.server_port}"])
        served.result()
    assert found.samples == {}
    assert len(sent) < 64
