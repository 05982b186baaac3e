#!/usr/bin/env bash
# Streams a completion over gRPC; reflection tells grpcurl what there is to call.
set -euo pipefail
grpcurl -plaintext ${SCALELLM_API_KEY:+-H "authorization: Bearer $SCALELLM_API_KEY"} \
  -d '{"prompt": "Once upon a time", "sampling": {"max_tokens": 32, "temperature": 0}}' \
  "${SCALELLM_ADDRESS:-127.0.0.1:50051}" scalellm.v1.Generation/Generate
