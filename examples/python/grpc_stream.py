"""Streams a completion over gRPC with scalellm.client."""

import os
import sys

from scalellm.client import Client, ClientError, Credentials
from scalellm.v1.common_pb2 import SamplingParams

address = os.environ.get("SCALELLM_ADDRESS") or "127.0.0.1:50051"
credentials = Credentials(os.environ.get("SCALELLM_API_KEY", ""))

with Client(address, credentials=credentials) as client:
    try:
        stream = client.complete("Once upon a time", SamplingParams(max_tokens=32, temperature=0), timeout=120)
        for piece in stream.text():
            print(piece, end="", flush=True)
    except ClientError as error:
        sys.exit(f"{error.code.name}: {error.message}")
print()
