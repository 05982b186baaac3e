"""`scalellm top`."""

from __future__ import annotations

import math
import os
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scalellm.cli.context import CliContext, CliError, ExitCode
from scalellm.cli.output import one_line
from scalellm.cli.scraping import scrape
from scalellm.launcher import NotRunningError
from scalellm.launcher.instance import ServiceRecord
from scalellm.services.common.addresses import local_address
from scalellm.services.common.metric_window import Scrape, Window, increase, quantile, rate

HELP = """Show live what the services do: requests, tokens, latencies, caches.

Figures are of the last ten seconds. q or Ctrl-C quits.

\b
Examples:
  scalellm top
  scalellm top --once                                    one frame, for a pipe or a log
  scalellm top --metrics host:9151 --metrics host:9152   services of another machine

Metrics endpoints that speak TLS: set SCALELLM_METRICS_TLS_CA, and SCALELLM_METRICS_TLS_CERT and _KEY where they ask
for a certificate.
"""

_WINDOW = 10.0
_BAR = 10
_ORDER = {"tokenizer": 0, "scheduler": 1, "executor": 2}
_HUGE = 1e12
_REQUESTS = "scalellm_tokenizer_requests"
_NOTHING: Mapping[str, str] = MappingProxyType({})


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("top", help=HELP, short_help="Show live what the services do.")(top)


def top(
    ctx: typer.Context,
    *,
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Metrics endpoint; once per service. Default: the instance's."),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Show figures until told to stop."""
    context = CliContext.of(ctx)
    addresses = metrics or _addresses(context)
    tls = context.environment.metrics_credentials.tls_context()
    if once:
        first = scrape(addresses, tls)
        time.sleep(interval)
        window = Window(first, scrape(addresses, tls))
        context.table(frame(window, _restarts(context)))
        if any(not new.samples for _, new in window.pairs):
            raise typer.Exit(ExitCode.FAILED)
        return
    if not context.out.is_terminal:
        raise CliError("standard output is not a terminal: use --once", ExitCode.USAGE)
    history = deque([scrape(addresses, tls)])
    try:
        with _keys() as keyboard, Live(Text("..."), console=context.out, screen=True, auto_refresh=False) as live:
            while not _quits(keyboard, interval):
                history.append(scrape(addresses, tls))
                while len(history) > 2 and history[1][0].at < history[-1][0].at - _WINDOW:
                    history.popleft()
                live.update(frame(Window(history[0], history[-1]), _restarts(context)), refresh=True)
    except KeyboardInterrupt:  # the way to end it, not an interruption
        return


def _addresses(context: CliContext) -> list[str]:
    instance = context.instance
    state = instance.load()
    if state is None:
        raise NotRunningError(f"not running (instance {instance.name!r})")
    found = [local_address(service.metrics_address) for service in state.services if service.metrics_address]
    if not found:
        raise CliError("no service of this instance has a metrics endpoint; name some with --metrics HOST:PORT")
    return found


def _restarts(context: CliContext) -> dict[str, str]:
    """Restarts of the services of the instance, with the last reason, by metrics address."""
    state = context.instance.load()
    services = state.services if state is not None else ()
    return {
        local_address(service.metrics_address): _restarts_of(service) for service in services if service.metrics_address
    }


def _restarts_of(service: ServiceRecord) -> str:
    if not service.ended_at:
        return "0"
    count = "given up" if service.given_up else str(service.restarts)
    return f"{count} ({time.strftime('%H:%M:%S', time.localtime(service.ended_at))} {service.reason})"


def frame(window: Window, restarts: Mapping[str, str] = _NOTHING) -> RenderableType:
    """One frame. `restarts`: of each service, by the address of its metrics, as far as they are known."""
    title = Text(f"scalellm top   {time.strftime('%H:%M:%S')}", style="bold")
    tables = [_services(window, restarts), _figures(window), _schedulers(window), _executors(window)]
    if len(window.labels("scalellm_scheduler_pool_executors", "tensor_parallel")) > 1:
        tables.insert(-1, _pools(window))
    return Group(title, *(part for table in tables for part in (Text(), table)))


def _services(window: Window, restarts: Mapping[str, str]) -> Table:
    table = _table("service", "metrics", "health", "cpu", "memory", *(("restarts",) if restarts else ()))
    for old, new in sorted(window.pairs, key=lambda pair: (_ORDER.get(pair[1].service, len(_ORDER)), pair[1].address)):
        health = _health(new)
        table.add_row(
            one_line(new.service) or "?",
            new.address,
            Text(health, style="green" if health == "ok" else "bold red"),
            _shown(100 * rate(old, new, "scalellm_process_cpu_seconds_total"), " %"),
            _shown(new.total("scalellm_process_resident_memory_bytes") / 2**20, " MiB"),
            *((restarts.get(new.address, "-"),) if restarts else ()),
        )
    return table


def _health(service: Scrape) -> str:
    match service.service:
        case "tokenizer":
            return "ok" if service.total("scalellm_tokenizer_scheduler_links") > 0 else "no link to the scheduler"
        case "scheduler":
            if not service.total("scalellm_scheduler_executors", phase="ready") > 0:
                return "no executor is ready"
            redis = "scalellm_scheduler_redis_up"
            return "Redis does not answer" if service.samples.get(redis) and not service.total(redis) > 0 else "ok"
        case "executor":
            if not service.total("scalellm_executor_engine_up") > 0:
                return "no engine"
            return "stuck" if service.total("scalellm_executor_engine_stalled") > 0 else "ok"
    return "is no service of ScaleLLM" if service.samples else "does not answer"


def _figures(window: Window) -> Table:
    queries = window.rate("scalellm_executor_prefix_cache_queries_total")
    hits = window.rate("scalellm_executor_prefix_cache_hits_total")
    running = window.gauge(f"{_REQUESTS}_running")
    waiting = window.gauge("scalellm_scheduler_num_requests_waiting")
    waiting += window.gauge("scalellm_executor_num_requests_waiting")
    ended = {
        outcome: window.rate(f"{_REQUESTS}_ended_total", outcome=outcome)
        for outcome in ("finished", "cancelled", "rejected")
    }
    again = {
        words: window.rate("scalellm_tokenizer_requests_resubmitted_total", reason=reason)
        for words, reason in (("as a scheduler was lost", "lost"), ("as one drains", "given_back"))
    }
    lines = (
        ("requests", f"{_shown(running)} running, {_shown(waiting)} waiting"),
        ("per second", ", ".join(f"{_shown(value, digits=1)} {outcome}" for outcome, value in ended.items())),
        (
            "tokens per second",
            f"{_shown(window.rate('scalellm_scheduler_prompt_tokens_total'))} in, "
            f"{_shown(window.rate('scalellm_generation_tokens_total'))} out",
        ),
        ("time to first token", _quantiles(window, "scalellm_time_to_first_token_seconds")),
        ("inter-token latency", _quantiles(window, "scalellm_inter_token_latency_seconds")),
        ("end to end", _quantiles(window, "scalellm_e2e_request_latency_seconds")),
        ("prefix cache hits", _share(hits, queries)),
        ("sent again", ", ".join(f"{_shown(value, digits=1)} {why}" for why, value in again.items()) + " per second"),
        ("preemptions", f"{_shown(window.rate('scalellm_executor_preemptions_total'), digits=1)} per second"),
    )
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, text in lines:
        table.add_row(Text(name, style="dim"), text)
    return table


def _schedulers(window: Window) -> Table:
    """Table of schedulers: the requests that the tokenizers send to each."""
    table = _table("sent to", "run", "req/s")
    for address in window.labels("scalellm_tokenizer_requests_sent_total", "scheduler"):
        table.add_row(
            one_line(address),
            _shown(window.gauge("scalellm_tokenizer_scheduler_requests", scheduler=address)),
            _shown(window.rate("scalellm_tokenizer_requests_sent_total", scheduler=address), digits=1),
        )
    return table


def _pools(window: Window) -> Table:
    """Table of executors by their devices: where a scheduler sends new requests, and the predictions behind it."""
    table = _table("scheduler", "devices each", "executors", "run", "predicted", "new requests")
    for _, new in sorted(window.of("scheduler"), key=lambda pair: pair[1].address):
        for devices in window.labels("scalellm_scheduler_pool_executors", "tensor_parallel"):
            table.add_row(
                new.address,
                one_line(devices),
                _shown(new.total("scalellm_scheduler_pool_executors", tensor_parallel=devices)),
                _shown(new.total("scalellm_scheduler_pool_running", tensor_parallel=devices)),
                _seconds(new.total("scalellm_scheduler_pool_predicted_seconds", tensor_parallel=devices)),
                "here" if new.total("scalellm_scheduler_pool_chosen", tensor_parallel=devices) > 0 else "",
            )
    return table


def _executors(window: Window) -> Table:
    are_several = len(window.labels("scalellm_executor_info", "model")) > 1
    columns = ("run", "wait", "KV cache", "hits", "preempt", "tok/s", "batch", "step")
    table = _table("executor", *(("model",) if are_several else ()), *columns)
    for old, new in sorted(window.of("executor"), key=lambda pair: pair[1].address):
        steps = increase(old, new, "scalellm_executor_step_sequences_count")
        sequences = increase(old, new, "scalellm_executor_step_sequences_sum")
        model = one_line(", ".join(Window([old], [new]).labels("scalellm_executor_info", "model"))) or "-"
        table.add_row(
            new.address,
            *((model,) if are_several else ()),
            _shown(new.total("scalellm_executor_num_requests_running")),
            _shown(new.total("scalellm_executor_num_requests_waiting")),
            _bar(new.total("scalellm_executor_kv_cache_usage_perc")),
            _share(
                increase(old, new, "scalellm_executor_prefix_cache_hits_total"),
                increase(old, new, "scalellm_executor_prefix_cache_queries_total"),
            ),
            _shown(new.total("scalellm_executor_preemptions_total")),
            _shown(rate(old, new, "scalellm_executor_generation_tokens_total")),
            _shown(sequences / steps if steps else math.nan, digits=1),
            _seconds(quantile([(old, new)], "scalellm_executor_step_seconds", 0.5)),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        right = number > 0 and column not in ("metrics", "model", "health", "restarts", "KV cache")
        table.add_column(column, no_wrap=True, justify="right" if right else "left")
    return table


def _quantiles(window: Window, histogram: str) -> str:
    return f"p50 {_seconds(window.quantile(histogram, 0.5))}   p99 {_seconds(window.quantile(histogram, 0.99))}"


def _shown(value: float, unit: str = "", digits: int = 0) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}{unit}" if abs(value) < _HUGE else f"{value:.0e}{unit}"


def _seconds(value: float) -> str:
    return _shown(value * 1e3, " ms", digits=1) if value < 1 else _shown(value, " s", digits=2)


def _share(part: float, whole: float) -> str:
    return _shown(100 * part / whole if whole else math.nan, " %")


def _bar(share: float) -> Text:
    if math.isnan(share):
        return Text("-")
    share = min(max(share, 0.0), 1.0)
    filled = round(share * _BAR)
    style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
    return Text.assemble(("█" * filled, style), ("░" * (_BAR - filled), "dim"), f" {100 * share:3.0f} %")


@contextmanager
def _keys() -> Iterator[int | None]:
    """The keyboard's file number, read key by key while this lasts; None where there is no keyboard."""
    if not sys.stdin.isatty():
        yield None
        return
    keyboard = sys.stdin.fileno()
    saved = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, saved)


def _quits(keyboard: int | None, seconds: float) -> bool:
    """Wait; whether q was pressed meanwhile."""
    if keyboard is None:
        time.sleep(seconds)
        return False
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        readable: Sequence[int] = select.select([keyboard], [], [], left)[0]
        if readable and os.read(keyboard, 1) in (b"q", b"Q", b""):
            return True
    return False
