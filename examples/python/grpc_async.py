"""Several completions at once over gRPC with scalellm.client and asyncio."""

import asyncio
import os

from scalellm.client import AsyncClient, Credentials
from scalellm.v1.common_pb2 import SamplingParams


async def complete(client: AsyncClient, prompt: str) -> str:
    """Return the whole answer."""
    stream = client.complete(prompt, SamplingParams(max_tokens=32, temperature=0), timeout=120)
    return "".join([piece async for piece in stream.text()])


async def main() -> None:
    """Print the answers in the order of the prompts."""
    address = os.environ.get("SCALELLM_ADDRESS") or "127.0.0.1:50051"
    prompts = ("Once upon a time", "The capital of France is", "2 + 2 =")
    async with AsyncClient(address, credentials=Credentials(os.environ.get("SCALELLM_API_KEY", ""))) as client:
        for answer in await asyncio.gather(*(complete(client, prompt) for prompt in prompts)):
            print(repr(answer))


asyncio.run(main())
