"""The backends: the stages of the losses, each in its own way. Contract: ``contract.py``."""

from repmtl_kernels.backends.choice import available_backends, backend_report

__all__ = ["available_backends", "backend_report"]
