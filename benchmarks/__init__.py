"""Benchmarks of repmtl_kernels: the losses' kernels, the training step, training quality.

``python -m benchmarks`` measures this machine and writes JSON, pictures and the tables of the
documentation; ``--quick`` measures a small part and writes nothing that is committed.
"""
