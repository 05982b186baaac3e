"""A client of requests that outlive their calls: it checks that each token comes once, over all its calls."""

from __future__ import annotations

import asyncio
import itertools

import grpc

from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE

KEEP = generation_pb2.ON_DISCONNECT_KEEP
ids = (f"kept-{number}" for number in itertools.count())


def request(max_tokens=40, *, n=1, logprobs=None, prompt_logprobs=None, seed=5, **fields):
    fields.setdefault("request_id", next(ids))
    fields.setdefault("on_disconnect", KEEP)
    sampling = common_pb2.SamplingParams(
        max_tokens=max_tokens, seed=seed, n=n, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )
    if "chat" not in fields:
        fields["prompt"] = "Hello there, who are you?"
    return generation_pb2.GenerateRequest(sampling=sampling, output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS, **fields)


class Client:
    """One client's view of an answer over all its calls."""

    def __init__(self, request: generation_pb2.GenerateRequest) -> None:
        n = request.sampling.n
        self.request = request
        self.texts = [""] * n
        self.tokens = [[] for _ in range(n)]
        self.logprobs = [[] for _ in range(n)]
        self.prompt_logprobs: list[float] = []
        self.ends: dict[int, generation_pb2.SampleFinished] = {}
        self.started: generation_pb2.Started | None = None
        self.finished: generation_pb2.Finished | None = None

    @property
    def offsets(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    async def begin(self, client, limit: int | None = None, timeout: float | None = PATIENCE) -> None:
        await self._read(client.generation.Generate(self.request, timeout=timeout), limit)

    async def resume(self, client, limit: int | None = None) -> None:
        message = generation_pb2.ResumeRequest(request_id=self.request.request_id, offsets=self.offsets)
        await self._read(client.generation.Resume(message, timeout=PATIENCE), limit)

    async def cancel(self, client) -> None:
        message = generation_pb2.CancelRequest(request_id=self.request.request_id)
        await client.generation.Cancel(message, timeout=PATIENCE)

    async def _read(self, call, limit: int | None) -> None:
        """Take messages until the end, or until there are so many tokens; then leave."""
        is_first = True
        while (event := await call.read()) is not grpc.aio.EOF:
            assert self.finished is None
            if is_first:
                assert event.HasField("started")
                assert self.started in (None, event.started)
                self.started, is_first = event.started, False
            elif event.HasField("prompt_logprobs"):
                part = event.prompt_logprobs
                assert part.offset <= len(self.prompt_logprobs)
                self.prompt_logprobs[part.offset :] = part.logprobs.logprobs
            elif event.HasField("delta"):
                delta = event.delta
                assert delta.offset == len(self.tokens[delta.index]), "each token comes exactly once"
                self.texts[delta.index] += delta.text
                self.tokens[delta.index] += delta.token_ids
                self.logprobs[delta.index] += delta.logprobs.logprobs
                assert len(delta.token_ids) == delta.num_tokens
                assert delta.index not in self.ends, "nothing comes after the end of a sample"
                if delta.HasField("finished"):
                    self.ends[delta.index] = delta.finished
            elif event.HasField("finished"):
                self.finished = event.finished
            if limit is not None and sum(self.offsets) >= limit and self.finished is None:
                call.cancel()
                return

    def check(self, other: Client) -> None:
        """Check that this client got the same answer as another one."""
        assert self.finished is not None
        assert other.finished is not None
        assert self.texts == other.texts
        assert self.tokens == other.tokens
        assert self.logprobs == other.logprobs
        assert self.prompt_logprobs == other.prompt_logprobs
        assert list(self.finished.samples) == list(other.finished.samples)
        assert [self.ends[index] for index in sorted(self.ends)] == list(self.finished.samples), "each end came once"
        assert self.finished.usage.completion_tokens == other.finished.usage.completion_tokens


async def serving(connect, service):
    """A client of a service, once it serves; while a worker is started again nobody listens."""
    while True:
        client = connect(service.address)
        try:
            await client.wait_serving()
            return client
        except grpc.aio.AioRpcError:
            await client.channel.close()
            await asyncio.sleep(0.05)
