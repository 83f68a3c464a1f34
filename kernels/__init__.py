"""Triton kernels and their launchers, one file per op. Importing one needs triton and no driver."""
