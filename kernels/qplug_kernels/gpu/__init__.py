"""Kernels in Triton: how weights lie in a GPU's memory, and how they are multiplied there."""
