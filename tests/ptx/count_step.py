"""Counts what a step asks of a GPU: launches, allocations and compilations, without one.

``PYTHONPATH=.:tests python -m ptx.count_step 4x64x512x7x7 4x37x512x7x7`` does so for the losses of
saliencies of these shapes, tasks first, forward and backward. Shapes follow each other as in one
training: what the first one compiled is there for the next. Launches are not carried out.

PyTorch's kernels are counted by its operators, those that make or change numbers. Some of them
launch more than one kernel on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptx.driver import Launches, driver
from repmtl_kernels import rep_mtl_loss
from repmtl_kernels.backends.triton import stages as triton_stages

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Counts(NamedTuple):
    """Counts of one call."""

    kernels: Counter[str]  # Triton's launches
    operators: Counter[str]  # PyTorch's that launch
    allocations: int
    compiled: Counter[str]  # variants of Triton's kernels
    tensor_maps: int

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.operators.total()


class Operators(TorchDispatchMode):
    """PyTorch's operators that launch a kernel, and the tensors with memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.allocations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {_memory(x) for x in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        results = [x for x in _tensors(result) if x.untyped_storage().nbytes() > 0]
        new = {_memory(x) for x in results} - before
        self.allocations += len(new)
        name = func.overloadpacket.__name__
        written = any(
            argument.alias_info and argument.alias_info.is_write
            for argument in func._schema.arguments
        )
        if (new or written) and "empty" not in name:
            self.launched[name] += 1
        return result


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def count(call: Callable[[], object], launches: Launches) -> Counts:
    """Return what a call asks for within ``driver() as launches``."""
    launched, loaded, maps = len(launches.all), len(launches.loaded), launches.tensor_maps
    with Operators() as operators:
        call()
    return Counts(
        Counter(launch.kernel for launch in launches.all[launched:]),
        operators.launched,
        operators.allocations,
        Counter(launches.loaded[loaded:]),
        launches.tensor_maps - maps,
    )


def step(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], object]:
    """Return a call of both losses, forward and backward, for ``(T, B, C, *spatial)``."""
    tasks, *of_task = shape
    saliencies = [torch.zeros(of_task, dtype=dtype, requires_grad=True) for _ in range(tasks)]

    def forward_and_backward() -> object:
        losses = rep_mtl_loss(saliencies, lambda_tsr=0.7, lambda_csa=0.3, backend="triton")
        return torch.autograd.grad(losses.total, saliencies)

    return forward_and_backward


def count_steps(shapes: list[tuple[int, ...]], dtype: torch.dtype, capability: int) -> list[Counts]:
    """Return the counts of a step of each shape, one after the other."""
    triton_stages.prepare = None  # its operators are no step's
    with driver(capability, execute=False) as launches:
        return [count(step(shape, dtype), launches) for shape in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ptx.count_step", description=__doc__)
    parser.add_argument("shapes", nargs="+", help="TxBxC or TxBxCxHxW")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    counts = count_steps(shapes, DTYPES[options.dtype], options.capability)
    for shape, of in zip(options.shapes, counts, strict=True):
        if options.json:
            print(json.dumps({"shape": shape, "launches": of.launches, **of._asdict()}))
            continue
        print(
            f"{shape}: {of.launches} launches ({of.kernels.total()} of Triton, "
            f"{of.operators.total()} of PyTorch), {of.allocations} allocations, "
            f"{of.compiled.total()} compilations, {of.tensor_maps} tensor maps"
        )
        for title in ("kernels", "operators", "compiled"):
            every = (f"{name} {n}" for name, n in getattr(of, title).most_common())
            print(f"    {title}: {', '.join(every) or 'none'}")


if __name__ == "__main__":
    main()
