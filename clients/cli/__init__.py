"""The `scalellm` command."""

import os

# gRPC's own log lines would stand in the middle of an answer. It reads this once, when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
