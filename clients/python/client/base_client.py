"""The part that is the same for threads and for asyncio: the connection, and calls that return a stream at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from scalellm.client.credentials import Credentials
from scalellm.client.errors import ClientError
from scalellm.client.received import Received
from scalellm.client.reconnection import Reconnection
from scalellm.client.requests import chat_request
from scalellm.client.stream import AsyncGenerationStream, GenerationStream
from scalellm.v1 import generation_pb2_grpc, sessions_pb2_grpc, tokenizer_pb2_grpc
from scalellm.v1.common_pb2 import SamplingParams
from scalellm.v1.generation_pb2 import GenerateRequest, ResumeRequest

StreamT = TypeVar("StreamT", bound=GenerationStream | AsyncGenerationStream)


class BaseClient(Generic[StreamT]):
    """Generates by one channel, and holds the stubs for all other calls.

    Args:
        channel: To the server.
        make_stream: The class of the streams.
        address: The server's host:port.
        timeout: Deadline of every call that does not generate, in seconds.
        credentials: The ones of the channel.
    """

    def __init__(
        self, channel: Any, make_stream: type[StreamT], address: str, timeout: float, credentials: Credentials
    ) -> None:
        self.address = address
        self._timeout = timeout
        self._credentials = credentials
        self._metadata = credentials.metadata
        self._channel = channel
        self._make_stream: type[StreamT] = make_stream
        self._generation = generation_pb2_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]
        self._tokenizer = tokenizer_pb2_grpc.TokenizerStub(channel)  # type: ignore[no-untyped-call]
        self._sessions = sessions_pb2_grpc.SessionsStub(channel)  # type: ignore[no-untyped-call]

    def generate(
        self,
        request: GenerateRequest,
        *,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> StreamT:
        """Start a generation.

        Args:
            request: The request.
            timeout: Seconds; the request's deadline on every hop. None: no deadline.
            metadata: Sent along, such as `traceparent` and `tracestate` of the trace that the call belongs to.
        """
        call = self._generation.Generate(request, timeout=timeout, metadata=(*self._metadata, *metadata))
        return self._stream(call, Received(), timeout)

    def complete(self, prompt: str, sampling: SamplingParams | None = None, *, timeout: float | None = None) -> StreamT:
        """Continue a text. Args as of `generate`; `sampling` says how tokens are drawn, None: the model's defaults."""
        return self.generate(GenerateRequest(prompt=prompt, sampling=sampling), timeout=timeout)

    def chat(
        self,
        messages: Sequence[tuple[str, str]],
        sampling: SamplingParams | None = None,
        *,
        session_id: str | None = None,
        timeout: float | None = None,
    ) -> StreamT:
        """Answer messages.

        Args:
            messages: (role, content) pairs; with a session, only those that are new.
            sampling: Sampling parameters; None: the model's defaults.
            session_id: Conversation that the server keeps: this one is continued, or begun.
            timeout: Seconds; the request's deadline on every hop. None: no deadline.
        """
        return self.generate(chat_request(messages, sampling, session_id), timeout=timeout)

    def resume(self, request_id: str, offsets: Sequence[int] = (), *, timeout: float | None = None) -> StreamT:
        """Go on with the answer to a request that was sent with ON_DISCONNECT_KEEP.

        Args:
            request_id: As `stream.started` told it.
            offsets: Tokens received, as `stream.offsets` tells them; empty: the answer is streamed from its beginning.
            timeout: Seconds for this call; it is not the request's deadline. None: no deadline.

        The stream raises ClientError with NOT_FOUND when the answer is no longer kept.
        """
        return self._stream(self._resume(request_id, offsets, timeout), Received(offsets), timeout)

    def _stream(self, call: Any, received: Received, timeout: float | None) -> StreamT:
        reconnection = Reconnection(self._resume, timeout)
        return self._make_stream(call, received, self.address, self._credentials, reconnection)

    def _resume(self, request_id: str, offsets: Sequence[int], timeout: float | None) -> Any:
        request = ResumeRequest(request_id=request_id, offsets=offsets)
        return self._generation.Resume(request, timeout=timeout, metadata=self._metadata)

    def _error(self, error: Any) -> ClientError:
        """The error of a call that does not stream."""
        return ClientError.from_rpc(error, self.address, self._credentials)
