"""Generated gRPC stubs of ScaleLLM."""
