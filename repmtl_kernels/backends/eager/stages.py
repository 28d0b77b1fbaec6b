"""The stages in plain PyTorch, for any device. Contract: ``backends/contract.py``."""

from repmtl_kernels.backends.eager.affinity import affinity
from repmtl_kernels.backends.eager.anchors import anchors
from repmtl_kernels.backends.eager.contrast import contrast
from repmtl_kernels.backends.eager.entropy import entropy
from repmtl_kernels.backends.eager.gradient import saliency_grad
from repmtl_kernels.backends.eager.gram import gram
from repmtl_kernels.backends.eager.statistics import statistics
from repmtl_kernels.backends.eager.values import values

__all__ = [
    "affinity",
    "anchors",
    "contrast",
    "entropy",
    "gram",
    "saliency_grad",
    "statistics",
    "values",
]
