"""Finds the fastest tiles of the Triton kernels on this GPU: ``python -m benchmarks.tune``."""
