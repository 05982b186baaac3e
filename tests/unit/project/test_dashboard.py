"""Grafana's dashboard: each panel says what it shows, heeds the filters, and has no alarm that means nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parents[3] / "deploy/monitoring/grafana/dashboards/scalellm.json"


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def panels() -> list[Any]:
    rows = dashboard()["panels"]
    return [panel for row in rows for panel in (row, *row.get("panels", ())) if panel["type"] != "row"]


def test_few_rows_are_open_and_the_others_hold_their_panels() -> None:
    rows = [panel for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows if not row["collapsed"]] == ["Overview", "Latency, as clients see it"]
    assert all(bool(row["panels"]) == row["collapsed"] for row in rows)
    numbers = [panel["id"] for panel in (*rows, *panels())]
    assert len(numbers) == len(set(numbers))


def test_each_panel_says_what_it_shows_and_is_red_only_where_it_says_why() -> None:
    for panel in panels():
        assert panel["description"], panel["title"]
        # Without thresholds of its own Grafana takes red above 80, whatever is shown.
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        alarming = {"TTFT p95", "Requests that failed", "Executors ready", "KV cache usage"}
        assert any(step["color"] == "red" for step in steps) == (panel["title"] in alarming), panel["title"]


def test_filters_hold_everywhere_and_nothing_is_nan_while_nothing_is_asked() -> None:
    names = [variable["name"] for variable in dashboard()["templating"]["list"]]
    assert names == ["datasource", "model", "executor", "instance"]
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            where = f"{panel['title']}: {expression}"
            for name, labels in re.findall(r'(?<![\w:"~])\b(scalellm_\w+)(\{[^}]*\})?', expression):
                filtered = '"$executor"' if name.startswith("scalellm_executor_") else '"$instance'
                assert filtered in labels, where
            if "histogram_quantile" in expression or re.search(r"\) / \(", expression):
                assert expression.endswith(">= 0") or "> 0)" in expression, where
