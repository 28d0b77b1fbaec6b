"""Benchmarks of repmtl_kernels: the losses' kernels, and the training step.

``python -m benchmarks`` measures everything on this machine and writes JSON, plots and README.md's
tables; ``--quick`` does a small part of it and writes nothing that is committed.
"""
