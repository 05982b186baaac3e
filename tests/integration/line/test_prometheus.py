"""The committed monitoring files in a real Prometheus, which scrapes the line during a mixed load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import psutil
import pytest

from line import Line, start_line
from mixed_load import PRESSED, laws_at_rest, run_mixed_load
from service_processes import PATIENCE, ROOT, Spawn

MONITORING = ROOT / "deploy" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "scalellm.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="needs prometheus and promtool: apt-get install prometheus",
    ),
]


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_config_and_rules_are_valid() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "config", "--syntax-only", "prometheus-tls.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "rules_test.yml")


def substituted(line: Line) -> str:
    """The committed configuration with this line's addresses, and faster: a test does not have minutes."""
    targets = {
        "tokenizer": [line.tokenizer.metrics_address],
        "scheduler": [line.scheduler.metrics_address],
        "executor": [executor.metrics_address for executor in line.executors],
    }
    config = (MONITORING / "prometheus.yml").read_text()
    config, count = re.subn(
        r"dns_sd_configs: \[\{names: \[(\w+)\].*\}\]",
        lambda match: f"static_configs: [{{targets: {json.dumps(targets[match[1]])}}}]",
        config,
    )
    assert count == len(targets)
    config = re.sub(r"(scrape|evaluation)_interval: \d+s", r"\1_interval: 1s", config)
    return config.replace("[rules.yml]", f"[{MONITORING / 'rules.yml'}]")


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir, tmp_path_factory: pytest.TempPathFactory) -> Line:
    traces = tmp_path_factory.mktemp("traces") / "none.jsonl"  # they are on, for their metric, and none is made
    return start_line(
        module_spawn,
        module_redis,
        model_dir("smollm2-135m-instruct"),
        executors=(PRESSED, PRESSED),
        tokenizer=("--workers", "2", "--trace-file", str(traces), "--trace-sample-ratio", "0"),
    )


@dataclass
class Prometheus:
    """A running server."""

    address: str

    def get(self, path: str, **parameters: str) -> dict:
        url = f"http://{self.address}/api/v1/{path}?{urlencode(parameters)}"
        try:
            with urlopen(url, timeout=PATIENCE) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise AssertionError(f"{url}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict]:
        return self.get("query", query=expression)["result"]

    def value(self, expression: str) -> float:
        (result,) = self.query(expression)
        return float(result["value"][1])


@pytest.fixture(scope="module")
def prometheus(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text(substituted(line))
    log = folder / "log"
    flags = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["prometheus", *flags, "--web.listen-address=127.0.0.1:0"], stdout=stream, stderr=stream
        )
    try:
        yield _wait_until_it_scrapes(process, log)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _wait_until_it_scrapes(process: subprocess.Popen[bytes], log: Path) -> Prometheus:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        # It tells nobody which port it took, but the kernel knows.
        for connection in psutil.Process(process.pid).net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                prometheus = Prometheus(f"{connection.laddr.ip}:{connection.laddr.port}")
                with contextlib.suppress(OSError, AssertionError):  # it is not ready yet
                    if sum(float(result["value"][1]) for result in prometheus.query("up")) == 4:
                        return prometheus
        time.sleep(0.2)
    raise AssertionError(f"Prometheus does not scrape:\n{log.read_text()}")


def settled(what_is_wrong: Callable[[], list]) -> None:
    """Wait until nothing is: for the workers' figures, a scrape and an evaluation."""
    deadline = time.monotonic() + PATIENCE
    while wrong := what_is_wrong():
        assert time.monotonic() < deadline, wrong
        time.sleep(0.5)


def dashboard_queries() -> list[tuple[str, str]]:
    rows = json.loads(DASHBOARD.read_text())["panels"]
    panels = [panel for row in rows for panel in (row, *row.get("panels", ()))]
    return [
        (panel["title"], re.sub(r"\$(instance|executor)", ".*", target["expr"]).replace("$__rate_interval", "1m"))
        for panel in panels
        for target in panel.get("targets", [])
    ]


def test_no_panel_shows_a_number_that_is_none_while_nothing_is_asked(prometheus: Prometheus) -> None:
    """Without requests every quantile and every ratio of a panel divides by zero."""
    settled(lambda: [] if prometheus.query("sum(rate(scalellm_e2e_request_latency_seconds_bucket[1m]))") else ["rates"])
    quantile = "histogram_quantile(0.5, sum by (le) (rate(scalellm_e2e_request_latency_seconds_bucket[1m])))"
    assert prometheus.query(quantile)[0]["value"][1] == "NaN", "this is what a panel has to hide"
    shown = [
        (title, query, result["value"][1]) for title, query in dashboard_queries() for result in prometheus.query(query)
    ]
    assert len(shown) > 40
    assert [entry for entry in shown if not math.isfinite(float(entry[2]))] == []


def test_after_a_mixed_load_everything_is_there_and_agrees(line: Line, prometheus: Prometheus) -> None:
    seen = asyncio.run(run_mixed_load(line, rounds=6))
    settled(lambda: [name for name, sides in laws_at_rest(line, seen).items() if sides[0] != sides[1]])

    # The same in Prometheus' words, from what it stored.
    laws = {
        "sum(scalellm_tokenizer_requests_submitted_total)": "sum(scalellm_scheduler_requests_accepted_total)",
        "sum(scalellm_scheduler_dispatches_total)": "sum(scalellm_executor_requests_accepted_total)",
        "sum(scalellm_executor_generation_tokens_total)": "sum(scalellm_scheduler_tokens_received_total)",
        "sum(scalellm_scheduler_tokens_sent_total)": (
            "sum(scalellm_generation_tokens_total) + sum(scalellm_tokenizer_tokens_discarded_total)"
        ),
        "sum(scalellm_e2e_request_latency_seconds_count)": (
            'sum(scalellm_tokenizer_requests_ended_total{outcome="finished"})'
        ),
    }
    settled(lambda: [left for left, right in laws.items() if prometheus.value(left) != prometheus.value(right)])
    first_tokens = prometheus.value("sum(scalellm_time_to_first_token_seconds_count)")
    assert 0 <= first_tokens - seen.with_first_token <= seen.perhaps_with_first_token

    documented = re.findall(
        r"^\| `(scalellm_\w+)` \|", (ROOT / "docs" / "operations" / "observe.md").read_text(), re.MULTILINE
    )
    settled(lambda: [name for name in documented if not prometheus.query(f'{{__name__=~"{name}(_bucket)?"}}')])
    settled(lambda: [(title, query) for title, query in dashboard_queries() if not prometheus.query(query)])


def test_every_rule_is_evaluated_and_none_of_them_alarms_a_sound_line(prometheus: Prometheus) -> None:
    def all_rules() -> list[dict]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    settled(lambda: [(rule["name"], rule.get("lastError")) for rule in all_rules() if rule["health"] != "ok"])
    rules = all_rules()
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    settled(lambda: [name for name in recorded if not prometheus.query(name)])
    # The load was made to fill the cache, and how slow this machine is now is not the question.
    alarms = {rule["name"]: rule["alerts"] for rule in rules if rule.get("alerts")}
    assert set(alarms) <= {"KVCacheFull", "EventLoopLag", "SlowFirstTokens"}, alarms


def test_every_runbook_is_there() -> None:
    rules = (MONITORING / "rules.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    runbooks = re.findall(r"runbook: docs/operations/observe.md#(\w+)", rules)
    assert runbooks == [alert.lower() for alert in alerts]
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operations" / "observe.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(set(alerts))
