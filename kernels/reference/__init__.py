"""Pure torch forms of the public ops, for tensors on any device: the CPU path, and the oracle of device kernels."""
