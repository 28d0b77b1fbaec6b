"""The one differentiable function of the package, as an ``autograd.Function``."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from repmtl_kernels._ground.record import Saved
from repmtl_kernels._ground.torch_private import is_legacy_batched
from repmtl_kernels._losses.backward import run_backward
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.forward import run_forward

NO_SECOND_DERIVATIVE = (
    "repmtl_kernels: a second derivative of tsr_loss, csa_loss or rep_mtl_loss was asked for; the "
    "{backend!r} backend has hand-written first derivatives only. Use backend='reference' "
    "(repmtl_kernels.reference), which supports double backward. If nobody asked for one: inside "
    "torch.compile, inputs of torch.func.grad that require a gradient make the compiler trace it; "
    "detach them, or make the call under torch.no_grad()."
)

NO_FORWARD_MODE = (
    "repmtl_kernels: a forward-mode derivative (torch.func.jvp, jacfwd, hessian) of tsr_loss, "
    "csa_loss or rep_mtl_loss was asked for; the {backend!r} backend has reverse mode only. Use "
    "torch.func.grad, vjp or jacrev, or backend='reference'."
)
NO_BATCHED_GRADIENTS = (
    "repmtl_kernels: torch.autograd.grad(is_grads_batched=True) sends several gradients at a time "
    "to tsr_loss, csa_loss or rep_mtl_loss; the {backend!r} backend takes one. Use torch.func.vmap "
    "over torch.func.vjp, or backend='reference'."
)


def _one_by_one(
    function: type[torch.autograd.Function], size: int, in_dims: tuple, inputs: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return the results of one call for each index that ``vmap`` maps over.

    CSA contrasts the samples of one call, so the mapped dimension can't be folded into the batch.
    """
    runs = [
        function.apply(
            *(
                x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    outputs = tuple(torch.stack(values) for values in zip(*runs, strict=True))
    return outputs, (0,) * len(outputs)


class Losses(torch.autograd.Function):
    """The function from the operands to ``(total, tsr, csa, *saved)``: three losses and the rest.

    ``traced``: a compiler traces this, and must see operators. PyTorch 2.11 does not know in all of
    its parts that it is compiling.
    """

    @staticmethod
    def forward(
        traced: bool,
        config: Config,
        present: Tensor | None,
        positions: Tensor | None,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        if traced:
            return tuple(torch.ops.repmtl.losses(operands, present, positions, *config.flat()))
        return run_forward(config, operands, present, positions)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(Losses, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(NO_FORWARD_MODE.format(backend=ctx.config.backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        traced, config, _, positions, *operands = inputs
        _, _, _, *saved = output
        ctx.traced = traced
        ctx.config = config
        ctx.operands = len(operands)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(positions, *operands, *saved)

    @staticmethod
    def backward(ctx, *grads_of_outputs):
        losses = grads_of_outputs[:3]
        wanted = tuple(ctx.needs_input_grad[4:])
        if all(g is None for g in losses):
            return None, None, None, None, *(None for _ in wanted)
        if any(g is not None and is_legacy_batched(g) for g in losses):
            raise RuntimeError(NO_BATCHED_GRADIENTS.format(backend=ctx.config.backend))
        saved = ctx.saved_tensors
        traced = ctx.traced or torch.compiler.is_compiling()
        grads = iter(Gradient.apply(traced, ctx.config, wanted, ctx.operands, *losses, *saved))
        return None, None, None, None, *(next(grads) if w else None for w in wanted)


class Gradient(torch.autograd.Function):
    """The backward of :class:`Losses`, a node of its own so that a second derivative is refused."""

    @staticmethod
    def forward(traced, config, wanted, count, total, tsr, csa, positions, *tensors):
        operands, saved = tensors[:count], Saved(*tensors[count:])
        if traced:
            return tuple(
                torch.ops.repmtl.losses_backward(
                    total, tsr, csa, positions, operands, saved, wanted, *config.flat()
                )
            )
        return tuple(run_backward(config, wanted, total, tsr, csa, positions, operands, saved))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(Gradient, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(NO_FORWARD_MODE.format(backend=ctx.backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[1].backend

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(NO_SECOND_DERIVATIVE.format(backend=ctx.backend))


# PyTorch asks for the signature of `forward` at every call. To inspect it takes longer than most
# kernels, so it is kept.
for _forward in (Losses.forward, Gradient.forward):
    vars(_forward)["__signature__"] = inspect.signature(_forward)
