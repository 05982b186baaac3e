"""A whole line in one process and on virtual time: the real objects of all services, but for sockets and models."""
