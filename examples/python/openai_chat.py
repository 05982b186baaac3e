"""Streams a chat answer with OpenAI's client."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1",
    api_key=os.environ.get("SCALELLM_API_KEY") or "none",  # the client wants one; a server without keys ignores it
)
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Name three primes."}],
    max_tokens=32,
    temperature=0,
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
