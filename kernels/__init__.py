"""Triton kernels and their launchers, one file an op. Importing one needs triton and no driver."""
