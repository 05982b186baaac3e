"""Figures of one run, in the shape that users of `vllm bench serve` know."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class RequestTrace:
    """When one request was sent and when its tokens came, in seconds on one clock."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    """One entry per message with tokens."""
    counts: list[int] = field(default_factory=list)
    """Tokens of each message."""


@dataclass(frozen=True)
class RunResult:
    """One run of one target."""

    target: str
    concurrency: int
    input_len: int
    duration: float
    traces: list[RequestTrace]

    @property
    def output_tokens(self) -> int:
        """Tokens generated in all."""
        return sum(sum(trace.counts) for trace in self.traces)

    @property
    def output_throughput(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.duration

    def latencies(self) -> dict[str, list[float]]:
        """Milliseconds: TTFT and TPOT per request, ITL per message."""
        return {
            "TTFT": [1e3 * (trace.arrivals[0] - trace.sent) for trace in self.traces],
            "TPOT": [
                1e3 * (trace.arrivals[-1] - trace.arrivals[0]) / max(1, sum(trace.counts) - trace.counts[0])
                for trace in self.traces
            ],
            "ITL": [
                1e3 * (late - early)
                for trace in self.traces
                for early, late in zip(trace.arrivals, trace.arrivals[1:], strict=False)
            ],
        }

    def summary(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        figures: dict[str, Any] = {
            "target": self.target,
            "concurrency": self.concurrency,
            "successful_requests": len(self.traces),
            "duration_s": self.duration,
            "total_input_tokens": self.input_len * len(self.traces),
            "total_generated_tokens": self.output_tokens,
            "request_throughput": len(self.traces) / self.duration,
            "output_throughput": self.output_throughput,
            "total_token_throughput": (self.output_tokens + self.input_len * len(self.traces)) / self.duration,
        }
        for name, values in self.latencies().items():
            key = name.lower()
            figures[f"mean_{key}_ms"] = statistics.fmean(values) if values else 0.0
            figures[f"median_{key}_ms"] = statistics.median(values) if values else 0.0
            figures[f"p99_{key}_ms"] = float(np.percentile(values, 99)) if values else 0.0
        return figures

    def text(self) -> str:
        """The same for people."""
        figures = self.summary()
        title = f" {self.target}, concurrency {self.concurrency} "
        lines = [f"{title:=^58}"]
        for label, key in (
            ("Successful requests:", "successful_requests"),
            ("Benchmark duration (s):", "duration_s"),
            ("Total input tokens:", "total_input_tokens"),
            ("Total generated tokens:", "total_generated_tokens"),
            ("Request throughput (req/s):", "request_throughput"),
            ("Output token throughput (tok/s):", "output_throughput"),
            ("Total token throughput (tok/s):", "total_token_throughput"),
        ):
            value = figures[key]
            lines.append(f"{label:<42}{value:>16,.2f}" if isinstance(value, float) else f"{label:<42}{value:>16,}")
        for name, title in (
            ("TTFT", "Time to First Token"),
            ("TPOT", "Time per Output Token (excl. 1st token)"),
            ("ITL", "Inter-token Latency"),
        ):
            lines.append(f"{title:-^58}")
            lines += [
                f"{f'{word} {name} (ms):':<42}{figures[f'{key}_{name.lower()}_ms']:>16,.2f}"
                for word, key in (("Mean", "mean"), ("Median", "median"), ("P99", "p99"))
            ]
        return "\n".join(lines)
