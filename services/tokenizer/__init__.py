"""The text edge: public gRPC services, chat templates, encoding, detokenising, stop strings and sessions."""
