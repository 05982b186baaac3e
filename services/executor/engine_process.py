"""The engine process: loads the model, then repeatedly receives messages, runs a step and sends its results.

Started by the front as `python -m scalellm.services.executor.engine_process SOCKET STACKS`, two descriptors, with its
settings as one JSON line on standard input. It is a process of its own because a step loop and an event loop in one
process fight for the GIL, and because a fault on the device must not take down the process that has to report it.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import signal
import socket
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.json_lines import read_line
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.link import lease_of
from scalellm.services.common.logs import LineLimit, configure_logging
from scalellm.services.executor.build import LoadedEngine, build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.credit_window import divide
from scalellm.services.executor.engine import LinkResult
from scalellm.services.executor.engine.batch import DeviceLostError, ScheduledBatch
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.step_time import StepTimeModel
from scalellm.services.executor.engine_link import EngineLink, accept_hello
from scalellm.services.executor.engine_load import step_time_to_wire
from scalellm.services.executor.engine_report import make_report
from scalellm.services.executor.ipc import EngineChannel, Kind, Message
from scalellm.services.executor.paced_output import PacedOutput
from scalellm.services.executor.request_trace import TracedRequests
from scalellm.services.executor.stall_report import write_stacks_to

_log = logging.getLogger(__name__)

_IDLE_BEAT = 0.5
_GRAMMAR_BEAT = 0.002
_LOAD_INTERVAL = 0.1
_STATS_INTERVAL = 0.5
"""Seconds between reports of statistics. A report delays the next step by a third of a millisecond on cold caches."""


class EngineLoop:
    """The main loop: receives the front's messages, runs the engine's steps, and sends results and statistics to the
    front.

    Args:
        loaded: The engine and what is known of its model.
        channel: The connection to the front.
        clock: The engine's clock, in seconds.
        is_tracing: True if traced requests are reported to the front.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        channel: EngineChannel,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_tracing: bool = False,
    ) -> None:
        self._loaded = loaded
        self._engine = loaded.engine
        self._channel = channel
        self._clock = clock
        self._is_tracing = is_tracing
        config = loaded.engine.config
        self._prefill_window = config.max_num_batched_tokens
        # A few more requests than can run, so that the row of a finished sequence is used in the very next step.
        self._request_window = config.max_num_seqs + max(1, config.max_num_seqs // 8)
        self._links: dict[int, EngineLink] = {}
        self._output = PacedOutput(loaded.output_interval)
        self._draining = False
        self._num_refused = 0
        self._last_load = self._last_stats = float("-inf")
        self._told_line: StepTimeModel | None = None
        self._log_limit = LineLimit()

    def run(self) -> NoReturn:
        """Serve until the front is gone, which raises EOFError, or the device is lost, which raises DeviceLostError."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Run one iteration: handle the received messages, and run a step if there is work. Raises the same as
        `run`.
        """
        busy = self._engine.has_unfinished()
        if not busy:  # report the idle state before waiting
            self._announce_load(self._links.values())
            self._send_stats()
            self._last_stats = float("-inf")  # so that the first step reports at once that there is work again
        patience = _IDLE_BEAT if not busy else _GRAMMAR_BEAT if self._engine.only_awaits_grammars else 0.0
        for message in self._channel.receive(patience):
            self._handle(message)
        if self._engine.has_unfinished():
            self._step()

    def _handle(self, message: Message) -> None:
        match message.kind:
            case Kind.FRAME:
                self._on_frame(message)
            case Kind.OPEN:
                self._on_open(message)
            case Kind.CLOSE:
                self._drop(message.link)
            case Kind.DRAIN:
                self._draining = True
                self._announce_load(self._links.values())
            case Kind.GIVE_BACK:
                self._engine.give_all_back("the executor is leaving, the request goes on elsewhere")
            case other:
                raise AssertionError(f"the front sent {other}")

    def _on_open(self, message: Message) -> None:
        try:
            hello = accept_hello(message.payload, self._loaded.welcome)
        except StatusError as error:
            self._refuse(message.link, error)
            return
        link = EngineLink(
            message.link,
            self._engine,
            renews=lease_of(hello, 1.0) is not None,
            traced=TracedRequests() if self._is_tracing else None,
        )
        self._links[message.link] = link
        if (line := self._engine.step_time()) is not None:
            link.tell(step_time_to_wire(line))
        others = [other for other in self._divide_windows() if other is not link]
        welcome = link.welcome_frame(self._loaded.welcome, self._draining)
        self._channel.send(Message(Kind.WELCOME, message.link, welcome))
        self._announce_load(others)

    def _on_frame(self, message: Message) -> None:
        link = self._links.get(message.link)
        if link is None:  # it was ended for a violation of the protocol
            return
        if cost := link.taken.add(message.payload):
            self._channel.send(Message(Kind.TAKEN, message.link, b"%d" % cost))
        demand = link.demand
        try:
            answer = link.on_frame(message.payload, self._clock(), self._draining)
        except StatusError as error:
            self._drop(message.link)
            self._refuse(message.link, error)
            return
        except Exception:  # an unexpected error ends this link alone
            _log.exception("a frame could not be taken in, its link ends")
            self._drop(message.link)
            self._refuse(message.link, StatusError(grpc.StatusCode.INTERNAL, "frame: could not be taken in"))
            return
        if link.demand is not demand:
            self._announce_load(self._divide_windows())
        if answer is not None:
            self._num_refused += 1
            self._channel.send(Message(Kind.FRAME, message.link, answer))
            self._report_traced(link)

    def _refuse(self, link: int, error: StatusError) -> None:
        self._channel.send(Message(Kind.REFUSE, link, error.to_link().SerializeToString()))

    def _drop(self, link: int) -> None:
        if (dropped := self._links.pop(link, None)) is not None:
            self._engine.drop_link(link)
            if dropped.traced is not None:
                dropped.traced.on_drop(self._clock())
                self._report_traced(dropped)
            self._announce_load(self._divide_windows())

    def _step(self) -> None:
        result = self._engine.step(self._before_launch)
        if result.error is not None and self._log_limit.admit() is not None:
            _log.error("a step failed, the cause is looked for among its requests", exc_info=result.error)
        for request in result.culprits:
            _log.error(
                "a request with which steps fail ends: %d prompt tokens, digest %s",
                len(request.prompt_token_ids),
                _digest(request),
                extra={"request_id": request.request_id},
            )
        if len(self._links) > 1:
            self._divide_windows()
        now = self._clock()
        due = self._output.add(result, now)
        is_load_due = now - self._last_load >= _LOAD_INTERVAL
        if is_load_due and not due:
            due = self._output.take(now)
        self._send_results(due)
        if is_load_due:
            self._last_load = now
            self._announce_load(link for number, link in self._links.items() if number not in due)
        if now - self._last_stats >= _STATS_INTERVAL:
            self._send_stats()
            self._tell_step_time()

    def _send_results(self, results: Mapping[int, LinkResult]) -> None:
        """Send results, by link, with the loads of their links."""
        links = [link for number, link in self._links.items() if number in results]
        self._channel.send(
            *(
                Message(Kind.FRAME, link.link, frame)
                for link in links
                for frame in link.step_frames(results[link.link], self._draining)
            )
        )
        for link in links:
            self._report_traced(link)

    def _before_launch(self, batch: ScheduledBatch) -> None:
        """Prepare for a step. If it computes prompts it may be long, so held results are sent before it. If requests
        start with it, the credits of their prompts are granted, so that others arrive while it runs: granted after it,
        they would miss the next step, and every other step would run with few prompt tokens.
        """
        if not (batch.num_prefill_tokens or batch.has_swaps):
            return
        if batch.started and len(self._links) > 1:
            self._divide_windows()
        held = self._output.take()
        self._send_results(held)
        if batch.started:
            self._announce_load(link for number, link in self._links.items() if number not in held)

    def _tell_step_time(self) -> None:
        line = self._engine.step_time()
        if line is not None and (self._told_line is None or not line.is_close(self._told_line)):
            self._told_line = line
            for link in self._links.values():
                link.tell(step_time_to_wire(line))

    def _report_traced(self, link: EngineLink) -> None:
        if link.traced is not None:
            for request in link.traced.take():
                self._channel.send(Message(Kind.TRACE, link.link, request.SerializeToString()))

    def _announce_load(self, links: Iterable[EngineLink]) -> None:
        for link in links:
            if (frame := link.load_frame(self._draining)) is not None:
                self._channel.send(Message(Kind.FRAME, link.link, frame))

    def _divide_windows(self) -> list[EngineLink]:
        """Divide the credits among the links by what they hold and want. Returns the links whose shares have
        changed.
        """
        links = list(self._links.values())
        if not links:
            return []
        windows = (self._request_window, self._prefill_window)
        columns = zip(*(link.claims(*windows) for link in links), strict=True)
        requests, tokens = (divide(window, column) for window, column in zip(windows, columns, strict=True))
        return [link for link, *shares in zip(links, requests, tokens, strict=True) if link.grant(*shares)]

    def _send_stats(self) -> None:
        self._last_stats = self._clock()
        report = make_report(
            self._engine,
            self._loaded.info,
            num_refused=self._num_refused,
            late_compiles=self._loaded.late_compiles(),
            draining=self._draining,
        )
        self._channel.send(Message(Kind.STATS, payload=report.SerializeToString()))


def _digest(request: EngineRequest) -> str:
    """Return a digest that identifies a prompt in the log without revealing its content."""
    token_ids = array("I", request.prompt_token_ids).tobytes()
    return hashlib.blake2b(token_ids, digest_size=8).hexdigest()


def main() -> None:
    """Run the engine until the front is gone. The arguments are descriptors: the front's socket, the file for stacks,
    and a socket for each other rank.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group: the front decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = EngineChannel(socket.socket(fileno=int(sys.argv[1])))
    write_stacks_to(int(sys.argv[2]))
    ranks = [EngineChannel(socket.socket(fileno=int(descriptor))) for descriptor in sys.argv[3:]]
    told = read_line(sys.stdin.buffer)
    if told is None:  # the front ended before it sent the settings
        return
    settings = ExecutorSettings.model_validate(told)
    configure_logging("engine", settings)

    def progress(text: str) -> None:
        channel.send(Message(Kind.PROGRESS, payload=text.encode()))

    try:
        try:
            loaded = build_engine(settings, progress, ranks)
        except StartError as error:
            channel.send(Message(Kind.FATAL, payload=str(error).encode()))
            return
        # The model and its modules live as long as the process, so the garbage collector need not scan them again.
        gc.collect()
        gc.freeze()
        EngineLoop(loaded, channel, is_tracing=settings.is_tracing).run()
    except EOFError:
        _log.info("the front is gone; the engine ends")
    except DeviceLostError:
        _log.exception("the device is lost, so this engine ends: another one is started, and its requests go on")
        os._exit(1)  # a driver that lost its device may not survive an orderly end


if __name__ == "__main__":
    main()
    os._exit(0)  # interpreter teardown with a large model takes seconds and has nothing left to do
