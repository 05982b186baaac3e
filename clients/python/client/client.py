"""The client for programs with threads: the generated stubs, with deadlines and one kind of error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from scalellm.client.credentials import NO_CREDENTIALS, Credentials
from scalellm.client.errors import ClientError
from scalellm.client.received import Received
from scalellm.client.reconnection import Reconnection
from scalellm.client.requests import CHANNEL_OPTIONS, SESSION_PAGE_SIZE, chat_request, turn_page
from scalellm.client.stream import GenerationStream
from scalellm.v1 import generation_pb2_grpc, sessions_pb2, sessions_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from scalellm.v1.common_pb2 import SamplingParams
from scalellm.v1.generation_pb2 import CancelRequest, Chat, GenerateRequest, ResumeRequest


class Client:
    """Calls one ScaleLLM server. Safe to share between threads; close it, or use it in a `with` block.

    Args:
        address: host:port of a tokenizer service.
        timeout: Deadline of every call that does not generate, in seconds.
        credentials: For a server that asks for an API key or speaks TLS.

    Every method raises ClientError. Raises CredentialsError when files cannot be read.
    """

    def __init__(self, address: str, *, timeout: float = 10.0, credentials: Credentials = NO_CREDENTIALS) -> None:
        self.address = address
        self._timeout = timeout
        self._credentials = credentials
        self._metadata = credentials.metadata
        self._channel = credentials.open_channel(address, CHANNEL_OPTIONS)
        self._generation = generation_pb2_grpc.GenerationStub(self._channel)  # type: ignore[no-untyped-call]
        self._tokenizer = tokenizer_pb2_grpc.TokenizerStub(self._channel)  # type: ignore[no-untyped-call]
        self._sessions = sessions_pb2_grpc.SessionsStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(
        self,
        request: GenerateRequest,
        *,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> GenerationStream:
        """Start a generation.

        Args:
            request: What to generate.
            timeout: Seconds; the request's deadline on every hop. None: no deadline.
            metadata: Sent along, such as `traceparent` and `tracestate` of the trace that the call belongs to.
        """
        call = self._generation.Generate(request, timeout=timeout, metadata=(*self._metadata, *metadata))
        return GenerationStream(call, Received(), self.address, self._credentials, Reconnection(self._resume, timeout))

    def complete(
        self, prompt: str, sampling: SamplingParams | None = None, *, timeout: float | None = None
    ) -> GenerationStream:
        """Continue a text. Args as of `generate`; `sampling` says how tokens are drawn, None: the model's defaults."""
        return self.generate(GenerateRequest(prompt=prompt, sampling=sampling), timeout=timeout)

    def chat(
        self,
        messages: Sequence[tuple[str, str]],
        sampling: SamplingParams | None = None,
        *,
        session_id: str | None = None,
        timeout: float | None = None,
    ) -> GenerationStream:
        """Answer messages.

        Args:
            messages: (role, content) pairs; with a session, only those that are new.
            sampling: How tokens are drawn; None: the model's defaults.
            session_id: Conversation that the server keeps: this one is continued, or begun.
            timeout: Seconds; the request's deadline on every hop. None: no deadline.
        """
        return self.generate(chat_request(messages, sampling, session_id), timeout=timeout)

    def resume(self, request_id: str, offsets: Sequence[int] = (), *, timeout: float | None = None) -> GenerationStream:
        """Go on with the answer to a request that was sent with ON_DISCONNECT_KEEP.

        Args:
            request_id: As `stream.started` told it.
            offsets: What was received, as `stream.offsets` tells it; empty: the answer is streamed from its beginning.
            timeout: Seconds for this call; it is not the request's deadline. None: no deadline.

        The stream raises ClientError with NOT_FOUND when the answer is no longer kept.
        """
        call = self._resume(request_id, offsets, timeout)
        reconnection = Reconnection(self._resume, timeout)
        return GenerationStream(call, Received(offsets), self.address, self._credentials, reconnection)

    def cancel(self, request_id: str) -> None:
        """End a request of ON_DISCONNECT_KEEP, if it has not ended; NOT_FOUND once it is no longer kept."""
        self._call(self._generation.Cancel, CancelRequest(request_id=request_id))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tokenizer_pb2.EncodeResponse:
        """Encode text to token ids."""
        request = tokenizer_pb2.EncodeRequest(text=text, add_special_tokens=add_special_tokens)
        response: tokenizer_pb2.EncodeResponse = self._call(self._tokenizer.Encode, request)
        return response

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode token ids to text."""
        request = tokenizer_pb2.DecodeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        response: tokenizer_pb2.DecodeResponse = self._call(self._tokenizer.Decode, request)
        return response.text

    def apply_chat_template(self, chat: Chat) -> tokenizer_pb2.ApplyChatTemplateResponse:
        """Render messages to the text and the tokens that the model reads."""
        request = tokenizer_pb2.ApplyChatTemplateRequest(chat=chat)
        response: tokenizer_pb2.ApplyChatTemplateResponse = self._call(self._tokenizer.ApplyChatTemplate, request)
        return response

    def info(self) -> tokenizer_pb2.GetInfoResponse:
        """Describe what is served, and the limits in force."""
        response: tokenizer_pb2.GetInfoResponse = self._call(self._tokenizer.GetInfo, tokenizer_pb2.GetInfoRequest())
        return response

    def get_session(self, session_id: str) -> sessions_pb2.Session:
        """Read one session with its messages, however many. NOT_FOUND when unknown or expired."""
        request = sessions_pb2.GetSessionRequest(session_id=session_id, page_size=SESSION_PAGE_SIZE)
        response: sessions_pb2.GetSessionResponse = self._call(self._sessions.Get, request)
        session = response.session
        while turn_page(request, response):
            response = self._call(self._sessions.Get, request)
            session.messages.extend(response.session.messages)
        return session

    def list_sessions(self) -> Iterator[sessions_pb2.Session]:
        """Iterate over all sessions, without their messages."""
        request = sessions_pb2.ListSessionsRequest()
        has_more = True
        while has_more:
            response: sessions_pb2.ListSessionsResponse = self._call(self._sessions.List, request)
            yield from response.sessions
            has_more = turn_page(request, response)

    def fork_session(
        self, session_id: str, new_session_id: str, *, num_turns: int | None = None
    ) -> sessions_pb2.Session:
        """Copy a session, or its first turns. ALREADY_EXISTS when the new id is taken."""
        request = sessions_pb2.ForkSessionRequest(
            session_id=session_id, new_session_id=new_session_id, num_turns=num_turns
        )
        response: sessions_pb2.ForkSessionResponse = self._call(self._sessions.Fork, request)
        return response.session

    def delete_session(self, session_id: str) -> None:
        """End a session. NOT_FOUND when unknown or expired."""
        self._call(self._sessions.Delete, sessions_pb2.DeleteSessionRequest(session_id=session_id))

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _resume(self, request_id: str, offsets: Sequence[int], timeout: float | None) -> Any:
        request = ResumeRequest(request_id=request_id, offsets=offsets)
        return self._generation.Resume(request, timeout=timeout, metadata=self._metadata)

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise ClientError.from_rpc(error, self.address, self._credentials) from None
