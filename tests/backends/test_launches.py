"""How many kernels a step of small saliencies launches, PyTorch's among them."""

import pytest
import torch
from cases import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from repmtl_kernels import available_backends, rep_mtl_loss

# Operators that return memory as it is.
SILENT = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty",
    "permute", "select", "slice", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """The operators that launch a kernel, and how many tensors got memory."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.allocations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in SILENT:
            self.names.append(name)
        if name not in SILENT or "empty" in name:
            self.allocations += not name.endswith("_") and result.numel() > 0
        return result


@pytest.mark.skipif(
    DEVICE != "cpu" or "triton" not in available_backends(), reason="counts under the interpreter"
)
@pytest.mark.parametrize("spatial", [(7, 7), ()], ids=["7 x 7", "pooled"])
def test_launches_at_office_size(spatial: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Four tasks of 64 samples and 512 channels; nothing depends on values, so none are made."""
    from triton.runtime.interpreter import GridExecutor

    counted = Launches()
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *_, **__: counted.names.append(self.fn.__name__)
    )
    saliencies = [
        torch.ones(64, 512, *spatial, dtype=torch.bfloat16, requires_grad=True) for _ in range(4)
    ]
    with counted:
        torch.autograd.grad(rep_mtl_loss(saliencies, backend="triton").total, saliencies)
    of_pytorch = [name for name in counted.names if not name.endswith("_kernel")]
    assert of_pytorch == ["ones_like"]  # where autograd begins
    assert len(counted.names) <= 14
    assert counted.allocations <= 30
