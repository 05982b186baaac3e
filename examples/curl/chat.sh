#!/usr/bin/env bash
# Streams a chat answer, as server-sent events.
set -euo pipefail
curl --silent --show-error --fail-with-body --no-buffer "${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}/chat/completions" \
  --header 'content-type: application/json' \
  ${SCALELLM_API_KEY:+--header "authorization: Bearer $SCALELLM_API_KEY"} \
  --data '{
    "messages": [{"role": "user", "content": "Name three primes."}],
    "max_tokens": 32,
    "temperature": 0,
    "stream": true
  }'
