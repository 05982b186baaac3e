"""Two runs side by side, as ratios."""

from __future__ import annotations

from typing import Any

_LATENCIES = tuple(
    f"{name}_ms.{key}" for name in ("ttft", "tpot", "itl", "e2e") for key in ("mean", "p50", "p90", "p99")
)
_FIGURES = ("output_throughput", "total_throughput", "request_throughput", "goodput", *_LATENCIES)
# What has to be alike for the ratios to speak of the targets alone.
_CONDITIONS = ("shape", "seed", "stream", "respect_eos", "deadline_s", "slo_ms")


def ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return, by load that both have and by figure: the first's, the second's, second over first."""
    seconds = {step["load"]: step for step in second["steps"]}
    compared: dict[str, dict[str, tuple[float, float, float]]] = {}
    for step in first["steps"]:
        if step["load"] not in seconds:
            continue
        figures = compared.setdefault(step["load"], {})
        for name in _FIGURES:
            a, b = _value(step["figures"], name), _value(seconds[step["load"]]["figures"], name)
            if a and b is not None:
                figures[name] = (a, b, b / a)
    return compared


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the reasons why the runs may not be comparable."""
    found = [
        f"{name} differs: {first['options'].get(name)} and {second['options'].get(name)}"
        for name in _CONDITIONS
        if first["options"].get(name) != second["options"].get(name)
    ]
    steps = {step["load"]: step for step in second["steps"]}
    for step in first["steps"]:
        other = steps.get(step["load"])
        if other is None:
            found.append(f"{step['load']}: only the first run has this load")
            continue
        if step["prompts"] != other["prompts"]:
            found.append(f"{step['load']}: other prompts were sent (give both the same --tokenizer)")
        elif step["figures"]["output_tokens"] != other["figures"]["output_tokens"]:
            a, b = step["figures"]["output_tokens"], other["figures"]["output_tokens"]
            found.append(f"{step['load']}: {a} and {b} tokens were generated")
        a, b = step["figures"]["input_tokens"], other["figures"]["input_tokens"]
        if step["prompts"] == other["prompts"] and a != b:
            found.append(f"{step['load']}: {a} and {b} prompt tokens were counted")
        for name, warned in (("first", step), ("second", other)):
            found += [f"{step['load']}, {name} run: {warning}" for warning in warned["warnings"]]
    return found


def compare_text(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Both as a table."""
    lines = [f"A: {first['target']}, {first['model']}", f"B: {second['target']}, {second['model']}"]
    for load, figures in ratios(first, second).items():
        lines.append(f"{f' {load} ':=^66}")
        lines.append(f"{'':<26}{'A':>14}{'B':>14}{'B / A':>12}")
        lines += [f"{name:<26}{a:>14,.2f}{b:>14,.2f}{ratio:>12.3f}" for name, (a, b, ratio) in figures.items()]
    lines += [f"warning: {difference}" for difference in differences(first, second)]
    return "\n".join(lines)


def _value(figures: dict[str, Any], name: str) -> float | None:
    key, _, part = name.partition(".")
    value = figures[key]
    found: float | None = value[part] if part and value is not None else value
    return found
