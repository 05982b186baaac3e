"""The HTTP face of a worker: what programs speak that know OpenAI's API, and what probes and scrapers ask.

It stands beside the gRPC face, on the same event loop, behind the same keys, limits and request path.
"""
