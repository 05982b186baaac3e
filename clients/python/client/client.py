"""The client for programs with threads: the generated stubs, with deadlines and one kind of error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from scalellm.client.base_client import BaseClient
from scalellm.client.credentials import NO_CREDENTIALS, Credentials
from scalellm.client.requests import CHANNEL_OPTIONS, SESSION_PAGE_SIZE, turn_page
from scalellm.client.stream import GenerationStream
from scalellm.v1 import sessions_pb2, tokenizer_pb2
from scalellm.v1.generation_pb2 import CancelRequest, Chat


class Client(BaseClient[GenerationStream]):
    """Calls one ScaleLLM server. Safe to share between threads; close it, or use it in a `with` block.

    Args:
        address: host:port of a tokenizer service.
        timeout: Deadline of every call that does not generate, in seconds.
        credentials: For a server that asks for an API key or speaks TLS.

    Every method raises ClientError. Raises CredentialsError when files cannot be read.
    """

    def __init__(self, address: str, *, timeout: float = 10.0, credentials: Credentials = NO_CREDENTIALS) -> None:
        channel = credentials.open_channel(address, CHANNEL_OPTIONS)
        super().__init__(channel, GenerationStream, address, timeout, credentials)

    def cancel(self, request_id: str) -> None:
        """End a request of ON_DISCONNECT_KEEP, if it has not ended; NOT_FOUND once it is no longer kept."""
        self._call(self._generation.Cancel, CancelRequest(request_id=request_id))

    def encode(self, text: str, *, add_special_tokens: bool = True, model: str = "") -> tokenizer_pb2.EncodeResponse:
        """Encode text to token ids of a model; empty: the default one."""
        request = tokenizer_pb2.EncodeRequest(text=text, add_special_tokens=add_special_tokens, model=model)
        response: tokenizer_pb2.EncodeResponse = self._call(self._tokenizer.Encode, request)
        return response

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, model: str = "") -> str:
        """Decode token ids of a model to text; empty: the default one."""
        request = tokenizer_pb2.DecodeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens, model=model)
        response: tokenizer_pb2.DecodeResponse = self._call(self._tokenizer.Decode, request)
        return response.text

    def apply_chat_template(self, chat: Chat, *, model: str = "") -> tokenizer_pb2.ApplyChatTemplateResponse:
        """Render messages to the text and the tokens that a model reads; empty: the default one."""
        request = tokenizer_pb2.ApplyChatTemplateRequest(chat=chat, model=model)
        response: tokenizer_pb2.ApplyChatTemplateResponse = self._call(self._tokenizer.ApplyChatTemplate, request)
        return response

    def info(self, model: str = "") -> tokenizer_pb2.GetInfoResponse:
        """Describe a model that is served, empty: the default one, and the limits in force."""
        request = tokenizer_pb2.GetInfoRequest(model=model)
        response: tokenizer_pb2.GetInfoResponse = self._call(self._tokenizer.GetInfo, request)
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

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None
