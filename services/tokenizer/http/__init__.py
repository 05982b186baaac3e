"""The HTTP service of a worker: APIs of OpenAI and Anthropic, health checks, metrics and web pages.

It runs beside the gRPC services on the same event loop, with the same keys, limits and request path.
"""
