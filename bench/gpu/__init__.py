"""`make gpu`: everything that only a machine with an NVIDIA GPU can tell, by one command, with nothing to download.

`python -m bench.gpu` runs the parts of `bench.gpu.parts` one after the other in processes of their own, and ends with a
table and a JSON file. `--dry-run` takes every path of it without a GPU: tiny shapes, kernels on Triton's interpreter,
and no figures.

Nothing here needs more than torch, Triton and the standard library, so a machine whose `python3` has these runs it as
it is.
"""
