"""The path of a request through the edge, common to all protocols, and its gRPC service."""
