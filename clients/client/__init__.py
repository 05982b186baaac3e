"""The Python client of ScaleLLM's public API."""

from clients.client.client import Client
from clients.client.errors import ClientError
from clients.client.stream import GenerationStream

__all__ = ["Client", "ClientError", "GenerationStream"]
