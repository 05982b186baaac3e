"""Tokenizers, detokenising, chat templates and stop strings: text and token ids only, without gRPC or protobuf."""
