"""Checks that heads can be trained with Rep-MTL, before training and on the first call.

They name the operation of a head that has no second derivative, its module and the remedy.
"""

from repmtl_kernels._heads.preflight.faults import SecondDerivativeError
from repmtl_kernels._heads.preflight.graph import made_from_another
from repmtl_kernels._heads.preflight.heads import check
from repmtl_kernels._heads.preflight.losses import check_losses
from repmtl_kernels._heads.preflight.means import without_means

__all__ = ["SecondDerivativeError", "check", "check_losses", "made_from_another", "without_means"]
