"""Streams a chat answer with litellm, which calls many servers alike."""

import os

import litellm

stream = litellm.completion(
    model="openai/smollm2-135m-instruct",  # behind openai/, the name that /v1/models shows
    api_base=os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1",
    api_key=os.environ.get("SCALELLM_API_KEY") or "none",
    messages=[{"role": "user", "content": "Name three primes."}],
    max_tokens=32,
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
