"""Shapes of what the compiled operators return, for compilers and fake tensors."""

from __future__ import annotations

import torch
from torch.library import register_fake

from repmtl_kernels._saliency import accumulation_dtype


@register_fake("repmtl_native::statistics")
def _(saliencies, positions, channels):
    first = saliencies[0]
    dtype = accumulation_dtype(first.dtype)
    pair = (len(saliencies), first.shape[0])
    shapes = (
        (*pair, first.shape[2:].numel()) if positions else (0,),
        (*pair, first.shape[1]) if channels else (0,),
        pair if channels else (0,),
    )
    return tuple(first.new_empty(shape, dtype=dtype) for shape in shapes)


@register_fake("repmtl_native::entropy")
def _(x, over_tasks, softmax, temperature, eps, with_grad):
    return x.new_empty(()), torch.empty_like(x) if with_grad else x.new_empty(0)


@register_fake("repmtl_native::unit_anchors")
def _(a, eps, with_grad):
    pull = torch.empty_like(a) if with_grad else a.new_empty(0)
    return torch.empty_like(a), a.new_empty(a.shape[1]), pull


@register_fake("repmtl_native::log_sum_exp")
def _(dots, first, temperature):
    return dots.new_empty(dots.shape[1])


@register_fake("repmtl_native::small_gram")
def _(saliencies, scale, anchors, with_grad):
    tasks, batch = scale.shape
    positions = saliencies[0].shape[2:].numel()
    last = (
        ((tasks, batch, tasks, positions), (tasks, batch, positions, positions))
        if with_grad
        else ((0,), (0,))
    )
    shapes = (scale.shape, scale.shape, *last)
    return tuple(scale.new_empty(shape) for shape in shapes)


# These write one of their arguments and return nothing.
for _name in ("weigh_dots", "through_normalisation", "add_outer", "small_gradient"):
    register_fake(f"repmtl_native::{_name}", lambda *args: None)
