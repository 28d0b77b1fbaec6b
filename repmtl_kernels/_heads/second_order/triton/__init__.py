"""The arithmetic of batch norm's derivatives as Triton kernels; ``contract.py`` describes it.

With ``g = m grad``, ``k = weight invstd``, ``u, v, s`` the three incoming gradients of the double
backward and ``mean(.)`` over a channel, the formulas written out are, in training::

    e = v - k mean(u ^x)
    a = mean(u g) - mean(u) mean(g) - mean(u ^x) mean(g ^x)
    grad_of_grad = m (k u + e ^x + s - k mean(u))
    grad_weight  = M invstd a
    grad_x       = invstd (e g - k mean(g ^x) u + k mean(g ^x) mean(u) - e mean(g)
                           - ^x (e mean(g ^x) - k mean(u ^x) mean(g ^x) + k a))

So each function reads the big tensors twice. The first pass makes at most five sums per channel, in
two stages and a fixed order. The second one writes results that are linear in ``g``, ``u`` and
``x - mean``, with coefficients per channel.
"""

from repmtl_kernels._heads.second_order.triton.stages import (
    batch_norm_backward,
    batch_norm_double_backward,
)

__all__ = ["batch_norm_backward", "batch_norm_double_backward"]
