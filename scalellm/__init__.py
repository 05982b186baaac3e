"""ScaleLLM for programs: `scalellm.client`, and the messages and stubs of its gRPC API in `scalellm.v1`."""

__version__ = "0.1.0"
