"""Model families, written against the ops of `kernels`."""
