"""A mask of positions in compilers, function transforms and the registered operators."""

import pytest
import torch
from cases import (
    BACKENDS,
    DEVICE,
    Case,
    supports,
)
from masked_cases import (
    EVERY_BACKEND,
    mask_of,
)
from torch import Tensor

from repmtl_kernels import (
    RepMTLLoss,
    csa_loss,
    rep_mtl_loss,
)
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.options import CsaOptions, TsrOptions

CASE = Case(2, 3, 12, (3, 3))


def _objective(backend: str):
    def function(*s, positions):
        return rep_mtl_loss([x * 2 for x in s], positions=positions, backend=backend).total * 3

    return function


@pytest.mark.cell("`positions=`, a mask of padding: `torch.compile`, `torch.vmap`, `torch.export`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_compile_full_graph(backend: str):
    torch.compiler.reset()
    function, tensors = _objective(backend), CASE.make(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for kind in ("random", "empty"):
        mask = mask_of(CASE, kind)
        actual, expected = compiled(*tensors, positions=mask), function(*tensors, positions=mask)
        torch.testing.assert_close(actual, expected)
        grads = torch.autograd.grad(actual, tensors)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, tensors))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_compile_of_func_grad(backend: str):
    torch.compiler.reset()
    function, mask = _objective(backend), mask_of(CASE, "random")
    tensors = [t.detach() for t in CASE.make(torch.float32)]
    grad = torch.func.grad(function)
    actual = torch.compile(grad, fullgraph=True, backend="aot_eager")(*tensors, positions=mask)
    torch.testing.assert_close(actual, grad(*tensors, positions=mask))


@pytest.mark.slow
@pytest.mark.cell("`positions=`, a mask of padding: `torch.compile`, `torch.vmap`, `torch.export`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_vmap(backend: str):
    """Over saliencies and masks, over saliencies alone, and over masks alone."""
    stacks = [torch.stack(Case(2, 3, 12, (3, 3)).make(torch.float32, seed=k)) for k in range(3)]
    stack = torch.stack(stacks).detach()  # (3, T, B, C, H, W)
    masks = torch.stack([mask_of(CASE, kind) for kind in ("random", "empty", "prefix")])

    def loss(s, positions):
        return rep_mtl_loss(s, positions=positions, backend=backend).total

    ways = {(0, 0): (stack, masks), (0, None): (stack, masks[0]), (None, 0): (stack[0], masks)}
    for dims, given in ways.items():
        each = [
            [x if dim is None else x[k] for x, dim in zip(given, dims, strict=True)]
            for k in range(3)
        ]
        actual = torch.vmap(loss, dims)(*given)
        torch.testing.assert_close(actual, torch.stack([loss(*one) for one in each]))
        grads = torch.vmap(torch.func.grad(loss), dims)(*given)
        exact = torch.stack([torch.func.grad(loss)(*one) for one in each])
        torch.testing.assert_close(grads, exact)


class Objective(torch.nn.Module):
    """Parameters before the loss, so that what is exported can be trained."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.loss = RepMTLLoss(lambda_tsr=0.7, lambda_csa=1.3, backend=backend)
        self.weight = torch.nn.Parameter(torch.randn(6, 6, device=DEVICE))

    def forward(self, a, b, positions):
        mixed = torch.einsum("oc,bcn->bon", self.weight, a).tanh()
        return self.loss([mixed, b], positions=positions).total


@pytest.mark.cell("`positions=`, a mask of padding: `torch.compile`, `torch.vmap`, `torch.export`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_export(backend: str):
    module = Objective(backend)

    def given(batch: int, count: int) -> tuple[Tensor, ...]:
        a, b = (torch.randn(batch, 6, count, device=DEVICE) for _ in range(2))
        return a, b, torch.rand(batch, count, device=DEVICE) < 0.7

    batch, count = torch.export.Dim("B"), torch.export.Dim("N")
    dims = {0: batch, 2: count}
    shapes = {"a": dims, "b": dims, "positions": {0: batch, 1: count}}
    exported = torch.export.export(module, given(3, 7), dynamic_shapes=shapes)
    loaded = exported.run_decompositions().module()
    for arguments in (given(3, 7), given(5, 4)):
        actual, expected = loaded(*arguments), module(*arguments)
        torch.testing.assert_close(actual, expected)
        grad = torch.autograd.grad(actual, loaded.weight)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, module.weight))


CONFIGS = {
    "both": {},
    "tsr": {"csa": None},
    "csa": {"tsr": None},
    "recompute": {"csa": CsaOptions(memory="recompute")},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend: str, name: str):
    config = Config(backend, False, 1, True, TsrOptions(), CsaOptions())._replace(**CONFIGS[name])
    dtype = torch.float64 if supports(backend, torch.float64) else torch.float32
    operands = [t.detach() for t in CASE.make(dtype)]
    mask = mask_of(CASE, "random")
    ops = torch.ops.repmtl
    torch.library.opcheck(ops.losses.default, (operands, None, mask, *config.flat()))
    _, _, _, *saved = ops.losses(operands, None, mask, *config.flat())
    one = torch.ones((), dtype=dtype, device=DEVICE)
    for grads in ((one, one), (one, None), (None, one)):
        if (config.tsr or grads[0] is None) and (config.csa or grads[1] is None):
            given = (None, *grads, mask, operands, saved, [False, True], *config.flat())
            torch.library.opcheck(ops.losses_backward.default, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_after_the_mask_has_changed(backend: str):
    """Autograd notices that a saved mask was written."""
    tensors, mask = CASE.make(torch.float32), mask_of(CASE, "random")
    value = csa_loss(tensors, positions=mask, backend=backend)
    mask[0, 0, 0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
