"""One file of cases for each file of kernels."""
