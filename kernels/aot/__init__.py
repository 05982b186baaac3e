"""Compiles every kernel variant for every supported GPU without having one, and holds what comes out.

    python -m scalellm.kernels.aot            # compile, print the table, compare with the baseline
    python -m scalellm.kernels.aot --write    # ... and make what came out the new baseline

Triton brings the whole compiler, down to ptxas. What it tells of a kernel without running it: registers, memory that
registers were spilled to, shared memory, how far loops load ahead (tiles in shared memory / loads under way while the
loop computes), and whether matrix products became wgmma (Hopper), tcgen05 (Blackwell) or mma instructions.
TRITON_INTERPRET must not be set.
"""
