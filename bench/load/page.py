"""A run as one page of HTML that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.load.figures import latencies_ms
from bench.load.plots import Axis, Series, distribution, line_plot, waterfall
from bench.load.run import Run, Step
from bench.load.text import step_text

# The parts of LatencyBreakdown that add up, in the order in which a request meets them.
_PARTS = (
    "session", "tokenize", "admission", "queue", "prefill", "decode", "failover", "detokenize", "network", "client",
)  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
section { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
section > *, figure { min-width: 0; max-width: 100%; }
h1, p { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.facts { color: GrayText; }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 0.3rem; }
svg { min-width: 30rem; max-width: 100%; height: auto; }
svg text { font-size: 11px; fill: currentColor; }
svg text.on-curves { paint-order: stroke; stroke: Canvas; stroke-width: 4px; }
svg .grid { stroke: currentColor; stroke-opacity: 0.15; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; }
pre { overflow-x: auto; font-size: 0.8rem; }
.warning { border-left: 4px solid #ee6677; padding-left: 0.7rem; }
"""
_COLUMNS = (
    ("ok", "ok"),
    ("failed", "failed"),
    ("cancelled", "cancelled"),
    ("req/s", "request_throughput"),
    ("good req/s", "goodput"),
    ("tok/s", "output_throughput"),
    ("TTFT p50", "ttft_ms.p50"),
    ("TTFT p99", "ttft_ms.p99"),
    ("TPOT p50", "tpot_ms.p50"),
    ("ITL p50", "itl_ms.p50"),
    ("ITL p99", "itl_ms.p99"),
    ("e2e p50", "e2e_ms.p50"),
    ("e2e p99", "e2e_ms.p99"),
)


def page(run: Run) -> str:
    """The page; well-formed as XML, too."""
    title = f"{run.header['model']} at {run.header['target']}"
    warnings = [f"{step.load}: {warning}" for step in run.steps for warning in step.warnings()]
    blocks = [step_text(f"load {step.load}", step.figures, []) for step in run.steps]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="facts">{escape(_facts(run))}</p>',
        *(f'<p class="warning">{escape(warning)}</p>' for warning in warnings),
        f"<h2>Steps</h2><p>Latencies in milliseconds.</p>{_table(run.steps)}",
        f"<h2>Throughput against latency</h2><section>{''.join(_trade_offs(run.steps))}</section>",
        f"<h2>Distributions</h2><section>{''.join(_distributions(run.steps))}</section>",
        f"<h2>Where the time goes</h2><section>{''.join(_waterfalls(run.steps))}</section>",
        f"<h2>All figures</h2><section>{''.join(f'<pre>{escape(block)}</pre>' for block in blocks)}</section>",
        f"<h2>Conditions</h2><pre>{escape(json.dumps(run.header, indent=2))}</pre>",
    ]
    head = f'<meta charset="utf-8"/><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _facts(run: Run) -> str:
    """Date, server, machine and versions of a run: the first things to know of a figure."""
    header = run.header
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    where = f"{header['machine']}, {header['cpus']} CPUs, Python {header['python']}"
    return f"{header['date']}; server {header['server_version']}; load from {where}, {versions}"


def _figure(caption: str, drawing: str) -> str:
    # On a phone a drawing is scrolled sideways: made as narrow, its texts could not be read.
    return f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll">{drawing}</div></figure>'


def _table(steps: Sequence[Step]) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in ("load", *(name for name, _ in _COLUMNS)))
    rows = []
    for step in steps:
        cells = "".join(f"<td>{_cell(step, key)}</td>" for _, key in _COLUMNS)
        rows.append(f"<tr><th>{escape(step.load)}</th>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(step: Step, key: str) -> str:
    value = _value(step, key)
    if value is None:
        return "–"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _value(step: Step, key: str) -> float | int | None:
    name, _, part = key.partition(".")
    value = step.figures[name]
    found: float | None = value[part] if part and value is not None else value
    return found


def _trade_offs(steps: Sequence[Step]) -> list[str]:
    """One plot per latency: its median and 99th percentile over the output throughput, a point per step."""
    plots = []
    for name, title in (("ttft", "TTFT"), ("itl", "ITL"), ("e2e", "End-to-end latency")):
        measured = [step for step in steps if step.figures[f"{name}_ms"] is not None]
        if not measured:
            continue
        series = [
            Series(
                rank,
                [(step.figures["output_throughput"], step.figures[f"{name}_ms"][rank]) for step in measured],
                markers=True,
                names=[step.load for step in measured],
            )
            for rank in ("p50", "p99")
        ]
        x = Axis.around("output tokens per second", [point[0] for point in series[0].points])
        y = Axis.around("milliseconds", [point[1] for one in series for point in one.points])
        plots.append(_figure(title, line_plot(title, series, x, y)))
    return plots


def _distributions(steps: Sequence[Step]) -> list[str]:
    plots = []
    for name, title in (("ttft", "TTFT"), ("itl", "ITL"), ("e2e", "End-to-end latency")):
        series = [distribution(f"load {step.load}", latencies_ms(step.records)[name]) for step in steps]
        series = [one for one in series if one.points]
        if not series:
            continue
        x = Axis.around("milliseconds", [point[0] for one in series for point in one.points], is_log=True)
        y = Axis("share of all that took at most this long", 0.0, 1.0)
        plots.append(_figure(title, line_plot(title, series, x, y)))
    return plots


def _waterfalls(steps: Sequence[Step]) -> list[str]:
    plots = []
    for step in steps:
        told = step.figures["breakdown_ms"]
        if told is not None:
            parts = [(name, told[name]) for name in _PARTS if told.get(name)]
            title = f"Mean request at load {step.load}"
            plots.append(_figure(title, waterfall(title, parts, _PARTS)))
    return plots or ["<p>The server sent no breakdown of its latency.</p>"]
