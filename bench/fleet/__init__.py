"""The fleet simulator: the real scheduler and engines by the thousand, on virtual time.

Replaced are two things only: sockets, by messages with a latency, and the model, by a line that says how long a step
takes. It shows what policies do, at which load and in which order; it cannot show what a service's own CPU time adds to
a client's wait, so that is reported beside it.
"""
