"""No call waits for the device; only a summary and a checkpoint do."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, DEVICE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rotation import synchronisation_refused
from repmtl_kernels import RepMTL, SaliencyMonitor
from repmtl_kernels._training.strength import FIRST

# Operations whose result the host has to know.
WAITING = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
)


class Refuse(TorchDispatchMode):
    """Raise where a value is read, or where an index depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        indexed = name in ("aten::index", "aten::index_put", "aten::index_put_")
        by_values = indexed and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name.startswith(WAITING) or by_values:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **kwargs or {})


def call(caller: nn.Module, seed: int, **masks) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 3, 40, generator=generator).to(DEVICE).requires_grad_()
    caller([(z**3).mean(), None, z.sin().mean()], z, **masks)


def masks() -> dict[str, Tensor]:
    return {
        "present": torch.ones(3, 4, dtype=torch.bool, device=DEVICE),
        "positions": torch.ones(4, 40, dtype=torch.bool, device=DEVICE),
    }


# Triton's interpreter reads values.
@pytest.mark.parametrize("backend", [b for b in BACKENDS if DEVICE == "cuda" or b != "triton"])
@pytest.mark.parametrize("given", [{}, masks()], ids=("plain", "masks"))
def test_no_value_is_read(
    backend: str, given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It reads the scales on the CPU alone, where it does not wait.
    monkeypatch.setattr("repmtl_kernels.backends.eager.gram.needs_prescale", lambda *_: True)
    monitor = SaliencyMonitor(every=1, keep=2, backend=backend)
    with Refuse():
        for seed in range(4):
            call(monitor, seed, **given)
    with pytest.raises(RuntimeError, match="waits"), Refuse():
        monitor.summary()
    criterion = RepMTL(0.5, 0.5, every=2, monitor=monitor, backend=backend)
    criterion._progress.calls = 2 * (FIRST + 1)  # past those that measure the ratio
    for seed in range(2):  # the first ones look at the heads and the means
        call(criterion, seed, **given)
    with Refuse():
        for seed in range(4):
            call(criterion, seed, **given)
    assert monitor.summary().observations == 10


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [{}, masks()], ids=("plain", "masks"))
def test_no_synchronisation(backend: str, given: dict[str, Tensor]) -> None:
    monitor = SaliencyMonitor(every=1, keep=2, backend=backend)
    criterion = RepMTL(0.5, 0.5, every=2, monitor=monitor, backend=backend)
    for caller in (monitor, criterion, criterion):  # kernels compile, workspaces are made
        call(caller, 0, **given)
    inputs = [torch.randn(4, 3, 40, device=DEVICE, requires_grad=True) for _ in range(2)]
    torch.cuda.synchronize()
    with synchronisation_refused():
        for z in inputs:
            losses = [(z**3).mean(), None, z.sin().mean()]
            monitor(losses, z, **given)
            criterion(losses, z, **given)
    assert monitor.summary().observations == 7


@pytest.mark.gpu
def test_a_captured_call_is_not_observed() -> None:
    monitor = SaliencyMonitor(every=1)
    z = torch.randn(4, 3, 40, device=DEVICE, requires_grad=True)

    def step() -> Tensor:
        losses = [(z**3).mean(), z.sin().mean()]
        monitor(losses, z)
        return torch.autograd.grad(sum(losses), z)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    assert monitor.summary().observations == 1
