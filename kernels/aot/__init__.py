"""Ahead-of-time compilation of every kernel variant for every supported GPU, on machines without one, and checks of the
results.

    python -m scalellm.kernels.aot            # compile, print the table, compare with the baseline
    python -m scalellm.kernels.aot --write    # ... and make the results the new baseline

Triton contains the whole compiler, down to ptxas. Known without running a kernel are: registers, spilled registers,
shared memory, how far loops load ahead (tiles in shared memory / loads under way while the loop computes), and whether
matrix products became wgmma (Hopper), tcgen05 (Blackwell) or mma instructions.
TRITON_INTERPRET must not be set.
"""
