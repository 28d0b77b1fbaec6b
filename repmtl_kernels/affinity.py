"""Which tasks pull the shared representation the same way: products of their saliencies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from repmtl_kernels import reference
from repmtl_kernels._losses.affinity import products
from repmtl_kernels._losses.arguments import checked_operands
from repmtl_kernels.backends import choice


def saliency_affinity(
    saliencies: Tensor | Sequence[Tensor],
    *,
    positions: Tensor | None = None,
    channel_dim: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return the inner products of the tasks' saliencies, sample by sample.

    ``affinity[b, t, u]`` is the sum of ``S_bt * S_bu`` over channels and positions. Where it is
    above 0, a step that lowers the loss of one task lowers that of the other, to first order; below
    0 the tasks conflict. The diagonal has the squared norms, so the cosine is
    ``affinity[b, t, u] / sqrt(affinity[b, t, t] * affinity[b, u, u])``. The saliencies are read
    once.

    Args:
        saliencies: as for :func:`tsr_loss`; :func:`task_saliencies` returns them.
        positions: bool ``(B, *spatial)``, False where there is padding. Whatever the saliencies
            hold there, NaN included, is not used, and the gradient there is exactly 0.
        channel_dim: dimension of the channels within one task's saliency, e.g. -1 for tokens
            ``(B, N, D)``.
        backend: as for :func:`tsr_loss`.

    Returns:
        ``(B, T, T)``, float64, symmetric. Products of saliencies of 1e-30 have no float32. Errors
        are those of the saliencies' precision, float32 or better, relative to the product of the
        two norms. Differentiable twice, with every backend.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    operands, stacked = checked_operands(saliencies, positions, channel_dim)
    backend = choice.resolve(backend, operands[0])
    if backend == "reference":
        return reference.products(operands, positions, stacked, channel_dim)
    return products(operands, positions, stacked, channel_dim, backend)
