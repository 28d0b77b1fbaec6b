"""The modules that a head runs, and which of them ran when."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from repmtl_kernels._ground import torch_private
from repmtl_kernels._heads.buffers import BufferCopies
from repmtl_kernels._heads.preflight.faults import Place
from repmtl_kernels._heads.preflight.graph import Ends, depends


class Calls:
    """Which module was running when, by PyTorch's sequence number of graph nodes."""

    def __init__(self, modules: Mapping[nn.Module, str]) -> None:
        self.modules = modules
        self.writes: str | None = None  # the innermost module that wrote to the representation
        self.cuts: str | None = None  # the innermost module whose result lost the representation
        self._representations: Sequence[Tensor] = ()
        self._ends: Ends = {}
        self._running: list[tuple[int, int, bool]] = []
        self._spans: list[tuple[int, int, str]] = []

    def begin(self, representations: Sequence[Tensor], ends: Ends) -> None:
        """Say which representations the head is going to run on."""
        self._representations, self._ends = representations, ends

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block the modules have hooks that note their calls."""
        with contextlib.ExitStack() as hooks:
            for module in self.modules:
                # Hooks would become part of what is compiled; scripted modules take none.
                if not is_compiled(module) and not isinstance(module, torch.jit.ScriptModule):
                    for handle in (
                        module.register_forward_pre_hook(self._enter),
                        module.register_forward_hook(self._leave, with_kwargs=True),
                    ):
                        hooks.callback(handle.remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        number = torch_private.next_sequence_number()
        self._running.append((number, version_of(self._representations), torch.is_grad_enabled()))

    def _leave(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        result: object,
    ) -> None:
        number, version, enabled = self._running.pop()
        label = self.label(module)
        # Children leave before their parents: the first one is the innermost.
        self._spans.append((number, torch_private.next_sequence_number(), label))
        if self.writes is None and version_of(self._representations) != version:
            self.writes = label
        # A module that runs under no_grad is not at fault, but the one that switched it on.
        if self.cuts is None and enabled:
            took = depends(tensors_in((args, kwargs)), self._ends)
            if took and not depends(tensors_in(result), self._ends):
                self.cuts = label

    def module_of(self, place: Place) -> str | None:
        """Return the label of the innermost module that made a node."""
        if place.operation.startswith("CompiledFunction"):
            compiled = [self.label(m) for m in self.modules if is_compiled(m)]
            if compiled:
                return ", ".join(compiled)
        return next((label for a, b, label in self._spans if a <= place.number < b), None)

    def label(self, module: nn.Module) -> str:
        """Return the name and class of a module, as messages show it."""
        kind = type(torch_private.uncompiled(module)).__name__
        name = self.modules[module]
        return f"{name!r} ({kind})" if name else kind


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` or ``module.compile`` compiles its forward."""
    return torch_private.is_compiled(module)


def modules_of(head: object) -> dict[nn.Module, str]:
    """Return the modules that a head runs, with their names; none inside a compiled one."""
    names: dict[nn.Module, str] = {}

    def add(module: nn.Module, name: str) -> None:
        if module in names:
            return
        names[module] = name
        if not is_compiled(module):
            for child, value in module.named_children():
                add(value, f"{name}.{child}" if name else child)

    for name, module in _roots(head, ""):
        add(module, name)
    return names


def _roots(value: object, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a module, method, partial or function with a closure refers to."""
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, types.MethodType):
        yield from _roots(value.__self__, "")
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _roots(part, "")
    elif isinstance(value, types.FunctionType):
        code = value.__code__
        names = {n: value.__globals__[n] for n in code.co_names if n in value.__globals__}
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        for variable, cell in cells:
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                names[variable] = cell.cell_contents
        for variable, item in names.items():
            if isinstance(item, Mapping):
                parts = {f"{variable}[{key!r}]": part for key, part in item.items()}
            elif isinstance(item, list | tuple):
                parts = {f"{variable}[{i}]": part for i, part in enumerate(item)}
            else:
                parts = {variable: item}
            yield from ((n, part) for n, part in parts.items() if isinstance(part, nn.Module))


@contextlib.contextmanager
def left_as_they_were(modules: Iterable[nn.Module], levels: Sequence[Tensor]) -> Iterator[None]:
    """Within the block modules run on copies of their buffers; modes and random state come back.

    levels: the representation, which may be on another device than the modules.
    """
    inside = {inner for module in modules for inner in module.modules()}
    tensors = [*levels, *(p for m in inside for p in m._parameters.values() if p is not None)]
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    modes = {module: module.training for module in inside}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {d.type for d in devices}:
            stack.enter_context(
                torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind)
            )
        for module, training in modes.items():
            stack.callback(setattr, module, "training", training)
        stack.enter_context(BufferCopies(inside))
        yield


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a nested result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])


def version_of(tensors: Iterable[Tensor]) -> int:
    """Return a number that changes when one of the tensors is written."""
    return sum(map(torch_private.writes_in_place, tensors))
