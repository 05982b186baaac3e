"""The three services of the serving line, and what they share."""

import os

# Read when grpc is imported. What we start runs another program at once and needs no gRPC of ours; with it, each start
# would put a line of gRPC's own into the log.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# gRPC's core prints a line for many a mistake of a peer, before anybody has looked at that one's key.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
