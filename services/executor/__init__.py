"""The executor: continuous batching, paged KV cache, models and sampling behind one gRPC service."""
