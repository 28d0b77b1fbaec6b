"""Finds the fastest tiles of the Triton kernels on the GPU at hand: ``python -m benchmarks.tune``.

candidates.py which tiles are tried, cases.py on what, compiling.py compiles them in parallel,
measuring.py times them and makes a table of the faster ones.
"""
