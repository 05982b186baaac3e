"""Sends conversations to a target, closed or open loop, and records what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from bench.load.meter import GeneratorUse, Meter
from bench.load.records import Ended, Request, RequestError, RequestRecord
from bench.load.target import Target
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Conversation, Load, Turn, arrival_times


@dataclass(frozen=True)
class StepRun:
    """One step that has been run.

    Attributes:
        records: One per request that was sent, in order of sending.
        not_sent: Turns of sessions that were not sent because an earlier one did not end well.
        generator: The generator's own use of the machine.
    """

    records: list[RequestRecord]
    not_sent: int
    generator: GeneratorUse


class Driver:
    """Runs steps against one target.

    Args:
        target: The server.
        vocabulary: Makes text of token ids.
        session_prefix: Session ids begin with it; another one for each run, as servers keep sessions for a while.
        stream: True if tokens are wanted as they come.
        deadline_s: Seconds that each request may take. It is sent along where the protocol can, and kept here.
        clock: Seconds of the time in which the target answers.
    """

    def __init__(
        self,
        target: Target,
        vocabulary: Vocabulary,
        *,
        session_prefix: str = "bench",
        stream: bool = True,
        deadline_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._target = target
        self._vocabulary = vocabulary
        self._session_prefix = session_prefix
        self._stream = stream
        self._deadline_s = deadline_s

    async def run(
        self,
        planned: Sequence[Conversation],
        load: Load,
        seed: str,
        on_end: Callable[[RequestRecord], None] = lambda record: None,
        times: Sequence[float] | None = None,
    ) -> StepRun:
        """Send all conversations; returns when the last one has ended.

        Args:
            planned: Requests to send.
            load: Times of sending.
            seed: For the open loop's arrivals.
            on_end: Told of each request.
            times: Seconds after the start at which the conversations begin, instead of by the load.
        """
        await self._target.connect(min(load.concurrency or 0, len(planned)))
        step = _Step(self, f"{self._session_prefix}-{seed}".replace("/", "."), on_end)
        async with Meter() as meter, asyncio.TaskGroup() as group:
            step.start = self.clock()
            if times is None and load.rate is not None:
                times = arrival_times(load.rate, len(planned), seed)
            if times is None:
                queue = iter(planned)
                for _ in range(min(load.concurrency or 1, len(planned))):
                    group.create_task(step.work_off(queue))
            else:
                for due, conversation in zip(times, planned, strict=True):
                    await asyncio.sleep(due - step.now())
                    group.create_task(step.converse(conversation, due))
        sent = sum(len(conversation.turns) for conversation in planned)
        use = meter.use(sum(len(record.counts) for record in step.records))
        return StepRun(step.records, sent - len(step.records), use)

    async def send(self, request: Request, record: RequestRecord, cancel_after: int | None, start: float) -> str:
        """Send one request and write down what becomes of it. Returns the answer's text."""
        texts: list[str] = []
        received = 0
        try:
            async with asyncio.timeout(self._deadline_s), aclosing(self._target.stream(request)) as events:
                async for event in events:
                    if isinstance(event, Ended):
                        record.server = event
                        continue
                    texts.append(event.text)
                    if request.stream:
                        record.arrivals.append(self.clock() - start)
                        record.counts.append(event.count)
                        received += event.count
                    if cancel_after is not None and received >= cancel_after:
                        record.status = "cancelled"
                        break
        except RequestError as error:
            record.status, record.kind, record.message = "failed", error.kind, str(error)
        except TimeoutError:
            record.status, record.kind, record.message = "failed", "deadline", f"not over after {self._deadline_s} s"
        record.ended = self.clock() - start
        return "".join(texts)

    def request(self, turn: Turn, session_id: str | None, history: Sequence[str]) -> Request:
        """The turn as a request."""
        needs_text = session_id is not None or not self._target.takes_token_ids
        text = self._vocabulary.text(turn.token_ids) if needs_text else ""
        return Request(
            turn.token_ids, text, turn.output_len, session_id, tuple(history), self._stream, self._deadline_s
        )


class _Step:
    """One step while it runs."""

    def __init__(self, driver: Driver, session_prefix: str, on_end: Callable[[RequestRecord], None]) -> None:
        self.records: list[RequestRecord] = []
        self.start = 0.0
        self._driver = driver
        self._session_prefix = session_prefix
        self._on_end = on_end

    def now(self) -> float:
        return self._driver.clock() - self.start

    async def work_off(self, queue: Iterator[Conversation]) -> None:
        """One place of the closed loop."""
        for conversation in queue:
            await self.converse(conversation, self.now())

    async def converse(self, conversation: Conversation, due: float) -> None:
        """All turns, one after the other, as long as they end well."""
        session_id = f"{self._session_prefix}-{conversation.number}" if conversation.is_session else None
        history: list[str] = []
        for place, turn in enumerate(conversation.turns):
            if turn.think_s:
                due = self.now() + turn.think_s
                await asyncio.sleep(turn.think_s)
            request = self._driver.request(turn, session_id, history)
            record = RequestRecord(
                conversation.number, place, len(turn.token_ids), turn.output_len, due=due, sent=self.now()
            )
            self.records.append(record)
            answer = await self._driver.send(request, record, turn.cancel_after, self.start)
            self._on_end(record)
            if record.status != "ok":
                return
            history += (request.text, answer)
            due = self.now()
