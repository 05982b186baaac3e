"""One step as text, in the shape that users of `vllm bench serve` know."""

from __future__ import annotations

from typing import Any

_WIDTH = 50
_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2e": "End-to-end Latency",
}


def step_text(title: str, figures: dict[str, Any], warnings: list[str]) -> str:
    """The block for one step; `figures` as `summarise` gives them."""
    lines = [f"{f' {title} ':=^{_WIDTH}}"]

    def line(label: str, value: float | int | None) -> None:
        if value is not None:
            lines.append(f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}")

    line("Successful requests:", figures["ok"])
    line("Failed requests:", figures["failed"])
    for kind, number in figures["failures"].items():
        line(f"  {kind}:", number)
    if figures["cancelled"]:
        line("Cancelled requests:", figures["cancelled"])
    line("Peak concurrent requests:", figures["peak_in_flight"])
    line("Benchmark duration (s):", figures["duration_s"])
    line("Total input tokens:", figures["input_tokens"])
    if figures["input_tokens"] != figures["planned_input_tokens"]:
        line("  as planned, without template, history:", figures["planned_input_tokens"])
    if figures["cached_tokens"]:
        line("  from the prefix cache:", figures["cached_tokens"])
    line("Total generated tokens:", figures["output_tokens"])
    if figures["output_tokens"] != figures["planned_output_tokens"]:
        line("  as asked for:", figures["planned_output_tokens"])
    if figures["tokens_lost"]:
        line("Tokens of failed, cancelled requests:", figures["tokens_lost"])
    line("Request throughput (req/s):", figures["request_throughput"])
    line("Request goodput (req/s):", figures["goodput"])
    line("Output token throughput (tok/s):", figures["output_throughput"])
    line("Total token throughput (tok/s):", figures["total_throughput"])
    for name, title in _TITLES.items():
        spread = figures[f"{name}_ms"]
        if spread is None:
            continue
        lines.append(f"{title:-^{_WIDTH}}")
        for word, key in (("Mean", "mean"), ("Median", "p50"), ("P90", "p90"), ("P99", "p99")):
            line(f"{word} {name.upper() if name != 'e2e' else 'E2EL'} (ms):", spread[key])
    lines.append("=" * _WIDTH)
    lines += [f"warning: {warning}" for warning in warnings]
    return "\n".join(lines)
