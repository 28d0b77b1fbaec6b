"""The arithmetic of batch norm's derivatives, which each form of it computes.

A form is a module with the two functions below: ``eager`` (any device) and ``triton``. They run
outside autograd.

Tensors of the size of ``x`` are ``(B, C, *spatial)``, 0 to 3 spatial dimensions, each with its own
strides (expanded ones too); ``M`` is the number of elements of a channel, never 0, and at least 2
with ``training``. ``mean`` and ``invstd``, ``(C,)`` float32 (float64 for float64), are constants
unless ``training``, where they are the batch's: ``invstd = 1 / sqrt(var(x) + eps)``, biased
variance. ``weight`` ``(C,)`` may have another dtype than ``x``; None is all ones. ``output`` is the
result of a ReLU that follows, or None where there is none. With a ReLU, batch norm and ReLU are
differentiated together: wherever ``grad`` stands below, it is ``m grad``, with
``m = 0 where output <= 0, else 1`` (1 at NaN, as in PyTorch); the mask itself is constant.
``^x = (x - mean) invstd``; sums and means are over all but the channels.

``batch_norm_backward(grad, x, weight, mean, invstd, output, training, needs)``
    ``-> (grad_x, grad_weight, grad_bias)``, None where ``needs`` (three bools, in this order) is
    False::

        grad_bias   = sum grad
        grad_weight = sum grad ^x
        grad_x      = weight invstd (grad - mean(grad) - ^x mean(grad ^x))       training
                    = weight invstd grad                                         else

``batch_norm_double_backward(grad_grad_x, grad_grad_weight, grad_grad_bias,``
``                           grad, x, weight, mean, invstd, output, training, needs)``
    ``-> (grad_of_grad, grad_x, grad_weight)``, None where ``needs`` is False: the derivatives of
    ``<v, grad_x> + <p, grad_weight> + <q, grad_bias>`` of the function above with respect to
    ``grad``, ``x`` and ``weight``. ``v, p, q`` are the first three arguments, each None for zero;
    not all three are. With ``g = m grad``, ``Pv = v - mean(v) - ^x mean(v ^x)``, ``V = sum v ^x``,
    ``G = sum g ^x``, ``A = sum g Pv = sum g v - sum(g) sum(v) / M - G V / M``, in training::

        grad_of_grad = m (weight invstd Pv + p ^x + q)
        grad_weight  = invstd A
        grad_x       = invstd P(p g - weight invstd / M (G v + V g)) - weight invstd^2 A / M ^x

    and else::

        grad_of_grad = m (weight invstd v + p ^x + q)
        grad_weight  = invstd sum g v
        grad_x       = invstd p g

Each result has the shape and dtype of what it is the gradient of: ``grad_of_grad`` of ``grad``,
``grad_weight`` and ``grad_bias`` of ``weight``, or the dtype of ``mean`` where ``weight`` is None.
Results of the size of ``x`` keep channels_last, else they are contiguous. Sums and products are
float32 or better, whatever the dtype of ``x``, and each result is rounded once. No argument is
written, no value is read on the host, and the same input gives the same bits.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, TypeVar

from torch import Tensor

Needs: TypeAlias = tuple[bool, bool, bool]
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
# For functions that return None for None.
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


class Form(Protocol):
    """A module with the arithmetic of batch norm's derivatives."""

    def batch_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        output: Tensor | None,
        training: bool,
        needs: Needs,
    ) -> Gradients:
        """Return grad_x, grad_weight and grad_bias."""

    def batch_norm_double_backward(
        self,
        grad_grad_x: Tensor | None,
        grad_grad_weight: Tensor | None,
        grad_grad_bias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        output: Tensor | None,
        training: bool,
        needs: Needs,
    ) -> Gradients:
        """Return grad_of_grad, grad_x and grad_weight."""
