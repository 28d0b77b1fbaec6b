"""How many kernels a step of small saliencies launches, PyTorch's among them."""

import pytest
import torch
from cases import DEVICE

from repmtl_kernels import available_backends, rep_mtl_loss

if DEVICE != "cpu" or "triton" not in available_backends():
    pytest.skip("counts under Triton's interpreter", allow_module_level=True)

from ptx.count_step import Operators
from triton.runtime.interpreter import GridExecutor

MOST_ALLOCATIONS = 30


@pytest.mark.parametrize("spatial", [(7, 7), ()], ids=["7 x 7", "pooled"])
def test_launches_at_office_size(spatial: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Four tasks of 64 samples and 512 channels; launches do not depend on values: none are made.

    PyTorch launches one operator, where autograd begins.
    """
    kernels: list[str] = []
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *_, **__: kernels.append(self.fn.__name__)
    )
    saliencies = [
        torch.ones(64, 512, *spatial, dtype=torch.bfloat16, requires_grad=True) for _ in range(4)
    ]
    with Operators() as operators:
        torch.autograd.grad(rep_mtl_loss(saliencies, backend="triton").total, saliencies)
    assert dict(operators.launched) == {"ones_like": 1}
    assert sorted(kernels) == sorted(set(kernels))  # each of them once
    assert len(kernels) == 12
    assert operators.allocations <= MOST_ALLOCATIONS
