"""Heads that can't be trained with Rep-MTL, and parts of heads, for the tests of preflight."""

from __future__ import annotations

import torch
from cases import DEVICE
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, multi_margin_loss, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

B, N, D = 2, 5, 8
FUSED = "ScaledDotProduct"


class Cube(torch.autograd.Function):
    """x^3 with a backward that can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Once(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return Cube.backward(ctx, grad)


class OwnKernel(Cube):
    """As with a kernel of its own: the gradient is right and has no graph."""

    @staticmethod
    def backward(ctx, grad):
        return Cube.backward(ctx, grad).detach()


class SyncBatchNorm(Once):
    """Named like PyTorch's, which needs a process group."""


class CudnnRnn(Once):
    """Named like PyTorch's, which needs a GPU."""


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def bags(x: Tensor) -> Tensor:
    """Bags of one row each: ``x``, by an operation without a second derivative."""
    rows = x.flatten(0, 1)
    return embedding_bag(torch.arange(len(rows), device=x.device)[:, None], rows).view_as(x)


def margins(x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    first = torch.zeros(len(rows), dtype=torch.long, device=x.device)
    return x * multi_margin_loss(rows, first, reduction="none").view(*x.shape[:2], 1)


class Tanh(nn.Module):
    def forward(self, x):
        return x.tanh()


class Attention(nn.Module):
    def forward(self, x):
        q = x[:, None]
        return scaled_dot_product_attention(q, q, q)[:, 0]


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


class Ignores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.bias * 2


def between(module: nn.Module) -> nn.Module:
    """The module inside a head: its name is ``trunk.1``."""
    trunk = nn.Sequential(nn.Linear(D, D), module)
    return nn.Sequential(nn.ModuleDict({"trunk": trunk})["trunk"], nn.Linear(D, 3))


def compiled(module):
    return torch.compile(module, backend="aot_eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="aot_eager")
    return module


def tokens(**options) -> Tensor:
    return torch.randn(B, N, D, device=DEVICE, **options)


# The module; its class, the operation and the remedy in the message.
FAULTY = {
    "compiled module": (
        lambda: compiled(nn.Sequential(nn.Linear(D, D), nn.Tanh())),
        "'0.1' (Sequential)",
        "torch.compile region",
        "Compile the encoder alone",
    ),
    "compiled in place": (
        lambda: compiled_in_place(Tanh()),
        "'0.1' (Tanh)",
        "torch.compile region",
        "Compile the encoder alone",
    ),
    "compiled function": (
        lambda: Apply(compiled(lambda x: x.tanh() * x)),
        "'0.1' (Apply)",
        "torch.compile region",
        "torch.func.grad",
    ),
    "attention": (Attention, "'0.1' (Attention)", FUSED, "sdpa_kernel(SDPBackend.MATH)"),
    "multihead attention": (
        lambda: SelfAttention(need_weights=False),
        "'0.1.attention' (MultiheadAttention)",
        FUSED,
        "sdpa_kernel(SDPBackend.MATH)",
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(D, 2, 16, batch_first=True).eval(),
        "'0.1.self_attn' (MultiheadAttention)",
        FUSED,
        "sdpa_kernel(SDPBackend.MATH)",
    ),
    "re-entrant checkpoint": (
        lambda: Checkpointed(True),
        "'0.1' (Checkpointed)",
        "re-entrant checkpointing",
        "use_reentrant=False",
    ),
    "synchronised batch norm": (
        lambda: Apply(SyncBatchNorm.apply),
        "'0.1' (Apply)",
        "SyncBatchNorm",
        "GroupNorm",
    ),
    "cuDNN": (lambda: Apply(CudnnRnn.apply), "'0.1' (Apply)", "CudnnRnn", "enabled=False"),
    "once differentiable": (
        lambda: Apply(Once.apply),
        "'0.1' (Apply)",
        "autograd.Function Once",
        "once_differentiable",
    ),
    "own kernel": (
        lambda: Apply(OwnKernel.apply),
        "'0.1' (Apply)",
        "OwnKernel gives a gradient without a graph",
        "differentiable operations",
    ),
    "no derivative": (
        lambda: Apply(bags),
        "'0.1' (Apply)",
        "operation EmbeddingBag has no derivative",
        "differentiate twice",
    ),
    "no derivative of a loss": (
        lambda: Apply(margins),
        "'0.1' (Apply)",
        "operation MultiMarginLoss has no derivative",
        "differentiate twice",
    ),
    "zero derivative": (
        lambda: Apply(torch.round),
        "'0.1' (Apply)",
        "Round is zero everywhere",
        "differentiate twice",
    ),
    "detached": (lambda: Apply(Tensor.detach), "'0.1' (Apply)", "does not depend", ".detach()"),
    "argmax": (
        lambda: Apply(lambda x: x.argmax(-1, keepdim=True).expand(B, N, D).float()),
        "'0.1' (Apply)",
        "does not depend",
        "argmax",
    ),
    "no_grad": (NoGrad, "'0.1' (NoGrad)", "does not depend", "no_grad"),
    "ignored": (Ignores, "'0.1' (Ignores)", "does not depend", "not used"),
}
