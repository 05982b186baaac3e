"""The client for asyncio: the same calls as `Client`, to be awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from scalellm.client.base_client import BaseClient
from scalellm.client.credentials import NO_CREDENTIALS, Credentials
from scalellm.client.requests import CHANNEL_OPTIONS, SESSION_PAGE_SIZE, turn_page
from scalellm.client.stream import AsyncGenerationStream
from scalellm.v1 import sessions_pb2, tokenizer_pb2
from scalellm.v1.generation_pb2 import CancelRequest, Chat


class AsyncClient(BaseClient[AsyncGenerationStream]):
    """Calls one ScaleLLM server, in the event loop in which it was made.

    Close it, or use it in an `async with` block.

    Args:
        address: host:port of a tokenizer service.
        timeout: Deadline of every call that does not generate, in seconds.
        credentials: For a server that asks for an API key or speaks TLS.

    Every method raises ClientError. Raises CredentialsError when files cannot be read.
    """

    def __init__(self, address: str, *, timeout: float = 10.0, credentials: Credentials = NO_CREDENTIALS) -> None:
        channel = credentials.open_async_channel(address, CHANNEL_OPTIONS)
        super().__init__(channel, AsyncGenerationStream, address, timeout, credentials)

    async def cancel(self, request_id: str) -> None:
        """End a request of ON_DISCONNECT_KEEP, if it has not ended; NOT_FOUND once it is no longer kept."""
        await self._call(self._generation.Cancel, CancelRequest(request_id=request_id))

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, model: str = ""
    ) -> tokenizer_pb2.EncodeResponse:
        """Encode text to token ids of a model; empty: the default one."""
        request = tokenizer_pb2.EncodeRequest(text=text, add_special_tokens=add_special_tokens, model=model)
        response: tokenizer_pb2.EncodeResponse = await self._call(self._tokenizer.Encode, request)
        return response

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, model: str = "") -> str:
        """Decode token ids of a model to text; empty: the default one."""
        request = tokenizer_pb2.DecodeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens, model=model)
        response: tokenizer_pb2.DecodeResponse = await self._call(self._tokenizer.Decode, request)
        return response.text

    async def apply_chat_template(self, chat: Chat, *, model: str = "") -> tokenizer_pb2.ApplyChatTemplateResponse:
        """Render messages to the text and the tokens that a model reads; empty: the default one."""
        request = tokenizer_pb2.ApplyChatTemplateRequest(chat=chat, model=model)
        response: tokenizer_pb2.ApplyChatTemplateResponse = await self._call(self._tokenizer.ApplyChatTemplate, request)
        return response

    async def info(self, model: str = "") -> tokenizer_pb2.GetInfoResponse:
        """Describe a model that is served, empty: the default one, and the limits in force."""
        request = tokenizer_pb2.GetInfoRequest(model=model)
        response: tokenizer_pb2.GetInfoResponse = await self._call(self._tokenizer.GetInfo, request)
        return response

    async def get_session(self, session_id: str) -> sessions_pb2.Session:
        """Read one session with its messages, however many. NOT_FOUND when unknown or expired."""
        request = sessions_pb2.GetSessionRequest(session_id=session_id, page_size=SESSION_PAGE_SIZE)
        response: sessions_pb2.GetSessionResponse = await self._call(self._sessions.Get, request)
        session = response.session
        while turn_page(request, response):
            response = await self._call(self._sessions.Get, request)
            session.messages.extend(response.session.messages)
        return session

    async def list_sessions(self) -> AsyncIterator[sessions_pb2.Session]:
        """Iterate over all sessions, without their messages."""
        request = sessions_pb2.ListSessionsRequest()
        has_more = True
        while has_more:
            response: sessions_pb2.ListSessionsResponse = await self._call(self._sessions.List, request)
            for session in response.sessions:
                yield session
            has_more = turn_page(request, response)

    async def fork_session(
        self, session_id: str, new_session_id: str, *, num_turns: int | None = None
    ) -> sessions_pb2.Session:
        """Copy a session, or its first turns. ALREADY_EXISTS when the new id is taken."""
        request = sessions_pb2.ForkSessionRequest(
            session_id=session_id, new_session_id=new_session_id, num_turns=num_turns
        )
        response: sessions_pb2.ForkSessionResponse = await self._call(self._sessions.Fork, request)
        return response.session

    async def delete_session(self, session_id: str) -> None:
        """End a session. NOT_FOUND when unknown or expired."""
        await self._call(self._sessions.Delete, sessions_pb2.DeleteSessionRequest(session_id=session_id))

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None
