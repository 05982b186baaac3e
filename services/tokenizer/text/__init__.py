"""The text core: no gRPC in here, no protobuf, and nothing but text and token ids."""
