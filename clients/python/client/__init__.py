"""The Python client of ScaleLLM's public API, for programs with threads (`Client`) and for asyncio (`AsyncClient`).

It needs grpcio and protobuf and nothing else. Requests and answers are the messages of `scalellm.v1`.
"""

from scalellm.client.async_client import AsyncClient
from scalellm.client.client import Client
from scalellm.client.credentials import NO_CREDENTIALS, Credentials, CredentialsError
from scalellm.client.errors import ClientError
from scalellm.client.stream import AsyncGenerationStream, GenerationStream

__all__ = [
    "NO_CREDENTIALS",
    "AsyncClient",
    "AsyncGenerationStream",
    "Client",
    "ClientError",
    "Credentials",
    "CredentialsError",
    "GenerationStream",
]
