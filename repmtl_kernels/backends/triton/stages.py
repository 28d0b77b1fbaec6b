"""The stages as Triton kernels, for CUDA. Contract: ``backends/contract.py``."""

from repmtl_kernels.backends.triton.affinity import affinity
from repmtl_kernels.backends.triton.anchors import anchors
from repmtl_kernels.backends.triton.contrast import contrast
from repmtl_kernels.backends.triton.entropy import entropy
from repmtl_kernels.backends.triton.first_use import prepare
from repmtl_kernels.backends.triton.gradient import saliency_grad
from repmtl_kernels.backends.triton.gram import gram
from repmtl_kernels.backends.triton.statistics import statistics
from repmtl_kernels.backends.triton.values import values

__all__ = [
    "affinity",
    "anchors",
    "contrast",
    "entropy",
    "gram",
    "prepare",
    "saliency_grad",
    "statistics",
    "values",
]
