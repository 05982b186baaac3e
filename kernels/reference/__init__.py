"""Pure torch forms of the public ops: what runs on a CPU, and the oracle that device kernels are compared with."""
