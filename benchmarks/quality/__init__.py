"""Training quality: methods against single-task training, ``python -m benchmarks.quality``."""
