"""A request's whole way through the edge, the same whatever it came by, and its gRPC face."""
