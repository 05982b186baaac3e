"""Triton forms of the public ops. Imported by `kernels.dispatch` alone, and only where they can run."""
