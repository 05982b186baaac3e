"""The latency breakdown of a request as a table that adds up."""

from __future__ import annotations

from itertools import accumulate, pairwise

from rich.table import Table

from scalellm.cli.output import Terminal, one_line
from scalellm.v1.common_pb2 import LatencyBreakdown
from scalellm.v1.generation_pb2 import Finished

_PARTS = (
    ("session_ns", "session", "loading the history"),
    ("tokenize_ns", "tokenize", "chat template and encoding"),
    ("admission_ns", "admission", "waiting in the scheduler"),
    ("queue_ns", "queue", "waiting in the executor"),
    ("prefill_ns", "prefill", "first step to first token"),
    ("decode_ns", "decode", "first token to last"),
    ("failover_ns", "failover", "lost on executors that died"),
    ("detokenize_ns", "detokenize", "the last text, and saving the session"),
    ("network_ns", "network", "between the services"),
)
_ROUND_NS = 10_000  # shown with two decimals of a millisecond


def rows(latency: LatencyBreakdown, measured_ns: int) -> list[tuple[str, str, float]]:
    """(part, meaning, milliseconds) per part; the shown numbers add up to the shown total exactly.

    Args:
        latency: The server's breakdown.
        measured_ns: Nanoseconds that the client measured from sending the request to the last message.
    """
    parts = [(name, meaning, int(getattr(latency, field))) for field, name, meaning in _PARTS]
    seen_by_server = sum(value for _, _, value in parts)
    parts.append(("client", "connecting, and between client and server", max(0, measured_ns - seen_by_server)))
    # Rounding the running sum, not each part: then the rounded parts cannot drift from the rounded total.
    ends = [round(total / _ROUND_NS) for total in accumulate((value for _, _, value in parts), initial=0)]
    return [
        (name, meaning, (end - start) * _ROUND_NS / 1e6)
        for (name, meaning, _), (start, end) in zip(parts, pairwise(ends), strict=True)
    ]


def print_breakdown(console: Terminal, finished: Finished, measured_ns: int) -> None:
    """Print the table, and below it what else is worth knowing about the request."""
    latency, usage = finished.latency, finished.usage
    parts = rows(latency, measured_ns)
    total = sum(value for _, _, value in parts)
    table = Table(title="Where the time went", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("%", justify="right")
    table.add_column("what", style="dim")
    for name, meaning, value in parts:
        table.add_row(name, f"{value:.2f}", f"{100 * value / total if total else 0:.1f}", meaning)
    table.add_row("total", f"{total:.2f}", "100.0", "as the client measured it", style="bold")
    console.print()
    console.print(table)
    console.print()
    # Decoding begins with the first token of each sample.
    decoded = usage.completion_tokens - len(finished.samples)
    rate = decoded / (latency.decode_ns / 1e9) if latency.decode_ns else 0.0
    facts = [f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached)"]
    facts.append(f"output {usage.completion_tokens} tokens")
    facts.append(f"first token after {latency.ttft_ns / 1e6:.1f} ms")
    if rate > 0:
        facts.append(f"then {rate:.1f} tokens/s")
    if usage.num_preemptions:
        facts.append(f"preempted {usage.num_preemptions} times ({latency.preempted_ns / 1e6:.1f} ms)")
    if usage.num_resumed:
        facts.append(f"{usage.num_resumed} tokens carried over from an executor that died")
    if latency.executor_id:
        facts.append(f"executor {one_line(latency.executor_id)}")
    console.print("; ".join(facts), soft_wrap=True)
