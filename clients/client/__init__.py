"""The Python client of ScaleLLM's public API."""

from clients.client.client import Client
from clients.client.credentials import NO_CREDENTIALS, Credentials, CredentialsError
from clients.client.errors import ClientError
from clients.client.stream import GenerationStream

__all__ = ["NO_CREDENTIALS", "Client", "ClientError", "Credentials", "CredentialsError", "GenerationStream"]
