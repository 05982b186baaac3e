"""Pure torch forms of the public ops, for tensors on the CPU: the CPU path, and the oracle of device kernels."""
