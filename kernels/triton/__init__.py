"""Triton forms of the public ops. Imported only by `kernels.dispatch`, and only if they can run."""
