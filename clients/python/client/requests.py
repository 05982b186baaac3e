"""Requests of both clients, and what is the same of every connection."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.v1.common_pb2 import SamplingParams
from scalellm.v1.generation_pb2 import Chat, ChatMessage, GenerateRequest
from scalellm.v1.sessions_pb2 import GetSessionRequest, GetSessionResponse, ListSessionsRequest, ListSessionsResponse

CHANNEL_OPTIONS = (
    # A server that vanished without closing its connection is noticed while a stream is open.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The address is dialled as it stands: web proxies do not carry HTTP/2 streams.
    ("grpc.enable_http_proxy", 0),
)

SESSION_PAGE_SIZE = 1000
"""Messages of a session per call."""


def chat_request(
    messages: Sequence[tuple[str, str]], sampling: SamplingParams | None, session_id: str | None
) -> GenerateRequest:
    """Build the request that answers (role, content) messages."""
    chat = Chat(messages=[ChatMessage(role=role, content=content) for role, content in messages])
    return GenerateRequest(chat=chat, sampling=sampling, session_id=session_id)


def turn_page(
    request: GetSessionRequest | ListSessionsRequest, response: GetSessionResponse | ListSessionsResponse
) -> bool:
    """Point the request to the page after that of the response; False if that was the last one."""
    if response.next_page_token in ("", request.page_token):  # a page that names itself has no end
        return False
    request.page_token = response.next_page_token
    return True
