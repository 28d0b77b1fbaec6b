"""Benchmarks of the losses' kernels, the training step and training quality."""
