"""Executors, or a scheduler: the downstream end of links, which answers every request with stamped tokens."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from typing import Any

from bench.services.neighbours.h2 import Stream, listen
from bench.services.neighbours.tally import Tally
from bench.services.neighbours.wire import stamp_now
from scalellm.v1 import common_pb2, link_pb2

_UNLIMITED = 2**62
_CANCELLED = link_pb2.LinkStatus(code=1, message="cancelled")


class _Link:
    """One link: the columns of its next step stand ready."""

    def __init__(self, stream: Stream, tally: Tally) -> None:
        self._stream = stream
        self._tally = tally
        self._handles: list[int] = []
        self._offsets: list[int] = []
        self._places: dict[int, int] = {}
        self._prompt_lens: dict[int, int] = {}
        self._last_steps: dict[int, list[int]] = defaultdict(list)
        self._aborted: list[int] = []
        self._seq = 0

    def submit(self, submit: link_pb2.Submit) -> None:
        self._places[submit.handle] = len(self._handles)
        self._handles.append(submit.handle)
        self._offsets.append(0)
        self._prompt_lens[submit.handle] = len(submit.token_ids)
        self._last_steps[self._seq + submit.sampling.max_tokens].append(submit.handle)

    def abort(self, handle: int) -> None:
        if handle in self._places:
            self._remove(handle)
            self._aborted.append(handle)

    @property
    def is_busy(self) -> bool:
        return bool(self._handles or self._aborted)

    def step(self) -> None:
        """One token for every request, in one frame; none while the peer reads too slowly, as a step that is late."""
        if not self.is_busy:
            return
        if self._stream.is_blocked:
            self._tally.counts["held_steps"] += 1
            return
        self._seq += 1
        count = len(self._handles)
        step = link_pb2.StepOutput(
            seq=self._seq,
            handles=self._handles,
            indices=[0] * count,
            offsets=self._offsets,
            counts=[1] * count,
            token_ids=[stamp_now()] * count,
            finished=[link_pb2.Finish(handle=handle, status=_CANCELLED) for handle in self._aborted],
            load=link_pb2.Load(
                free_blocks=1_000_000,
                total_blocks=1_000_000,
                running=count,
                waiting=0,
                waiting_prefill_tokens=0,
                granted_prefill_tokens=_UNLIMITED,
                granted_requests=_UNLIMITED,
                draining=False,
            ),
        )
        self._aborted.clear()
        self._offsets = [offset + 1 for offset in self._offsets]
        for handle in self._last_steps.pop(self._seq, ()):
            if handle in self._places:
                self._finish(step, handle)
        counts = self._tally.counts
        counts["sent_tokens"] += count
        counts["steps"] += 1
        self._stream.send(link_pb2.ServerFrame(step=step).SerializeToString())

    def _finish(self, step: link_pb2.StepOutput, handle: int) -> None:
        usage = common_pb2.Usage(prompt_tokens=self._prompt_lens[handle], completion_tokens=self._remove(handle))
        timings = link_pb2.HopTimings(executor_total_ns=4000, queue_ns=1000, prefill_ns=2000, decode_ns=1000)
        step.finished_samples.add(handle=handle, reason=common_pb2.FINISH_REASON_LENGTH)
        step.finished.add(handle=handle, usage=usage, timings=timings)

    def _remove(self, handle: int) -> int:
        """Take a request out; the last one moves to its place. Returns its number of tokens."""
        place = self._places.pop(handle)
        tokens = self._offsets[place]
        last_handle, last_offset = self._handles.pop(), self._offsets.pop()
        if last_handle != handle:
            self._handles[place], self._offsets[place] = last_handle, last_offset
            self._places[last_handle] = place
        del self._prompt_lens[handle]
        return tokens


class SimulatedEngines:
    """`count` executors on ports of their own (or one scheduler), stepping by the clock, each in its own phase.

    Args:
        count: Number of executors.
    """

    def __init__(self, count: int) -> None:
        self.addresses: list[str] = []
        self._count = count
        self._tally = Tally()
        self._links: list[list[_Link]] = [[] for _ in range(count)]
        self._period = 0.0
        self._generation = 0
        self._at_once: set[_Link] = set()

    async def listen(self) -> None:
        """Open the ports."""
        for number in range(self._count):
            self.addresses.append(await listen(lambda stream, number=number: self._on_call(stream, number)))  # type: ignore[misc]

    async def start(self, steps_per_s: float) -> None:
        """Step from now on; 0: as soon as there is something to do."""
        self._generation += 1
        self._period = 1 / steps_per_s if steps_per_s else 0.0
        if self._period:
            loop = asyncio.get_running_loop()
            for number in range(self._count):
                due = loop.time() + self._period * (1 + number / self._count)
                loop.call_at(due, self._tick, self._generation, number, due)

    def take(self) -> dict[str, Any]:
        """Counts since the last call."""
        return self._tally.take()

    async def stop(self) -> None:
        """Step no more, but for what is aborted."""
        await self.start(0)

    def _tick(self, generation: int, number: int, due: float) -> None:
        if generation != self._generation:
            return
        for link in self._links[number]:
            link.step()
        loop = asyncio.get_running_loop()
        due += self._period
        while due < loop.time() - self._period:  # this process is late itself: what is missed is missed
            due += self._period
            self._tally.counts["missed_ticks"] += 1
        loop.call_at(due, self._tick, generation, number, due)

    def _on_call(self, stream: Stream, number: int) -> None:
        link = _Link(stream, self._tally)
        stream.on_message = lambda message: self._on_message(stream, link, number, message)
        stream.on_end = lambda: self._on_end(link, number)

    def _on_end(self, link: _Link, number: int) -> None:
        if link in self._links[number]:
            self._links[number].remove(link)

    def _on_message(self, stream: Stream, link: _Link, number: int, message: bytes) -> None:
        frame = link_pb2.ClientFrame.FromString(message)
        if frame.HasField("submit"):
            link.submit(frame.submit)
        elif frame.HasField("abort"):
            link.abort(frame.abort.handle)
        else:
            stream.send(_welcome())
            self._links[number].append(link)
        if not self._period and link.is_busy:
            self._step_soon(link)

    def _step_soon(self, link: _Link) -> None:
        if link not in self._at_once:
            self._at_once.add(link)
            asyncio.get_running_loop().call_soon(self._step_at_once, link)

    def _step_at_once(self, link: _Link) -> None:
        self._at_once.discard(link)
        link.step()
        if link.is_busy and not self._period:
            asyncio.get_running_loop().call_later(0.0005, self._step_soon, link)


def _welcome() -> bytes:
    welcome = link_pb2.Welcome(
        instance_id=uuid.uuid4().hex,
        api_minor=1,
        model="simulated",
        block_size=16,
        num_blocks=1_000_000,
        max_model_len=131_072,
        max_num_seqs=4096,
        vocab_size=49_152,
        load=link_pb2.Load(granted_prefill_tokens=_UNLIMITED, granted_requests=_UNLIMITED),
    )
    return link_pb2.ServerFrame(welcome=welcome).SerializeToString()
