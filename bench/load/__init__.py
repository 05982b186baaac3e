"""One load generator for ScaleLLM's gRPC API and for any OpenAI-compatible server.

Same prompts, same clock, same arithmetic for each: `python -m bench.load --help`.
"""
