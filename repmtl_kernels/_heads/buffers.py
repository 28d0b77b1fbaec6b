"""Modules that run on copies of their buffers, and checkpointing with that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class BufferCopies(AbstractContextManager):
    """While entered, modules have copies of the buffers that they had when this was constructed.

    It may be entered again, with new copies. A buffer that modules share stays shared.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._originals = {module: dict(module._buffers) for module in modules}
        self._values = _copies(b for bs in self._originals.values() for b in bs.values())
        self._at_entry: dict[nn.Module, dict[str, Tensor | None]] = {}

    def __enter__(self) -> None:
        self._at_entry = {module: dict(module._buffers) for module in self._originals}
        copies = _copies(self._values.values())
        for module, buffers in self._originals.items():
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies[self._values[buffer]]

    def __exit__(self, *error: object) -> None:
        # One by one: the buffers of a scripted module can be set, but not removed or added.
        for module, buffers in self._at_entry.items():
            for name in module._buffers.keys() - buffers.keys():
                del module._buffers[name]
            for name, buffer in buffers.items():
                module._buffers[name] = buffer


def _copies(buffers: Iterable[Tensor | None]) -> dict[Tensor, Tensor]:
    with torch.inference_mode(False):  # else no forward outside of it could write to them
        return {buffer: buffer.detach().clone() for buffer in buffers if buffer is not None}


def checkpoint_contexts(
    *modules: nn.Module,
) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """Return a ``context_fn`` for checkpointing that updates running statistics once a step.

    Usage::

        y = checkpoint(head, z, use_reentrant=False, context_fn=checkpoint_contexts(head))

    Checkpointing runs the function again in each backward pass, and its batch norms then update
    their running statistics again: twice a step in ordinary training, three times for a head under
    :class:`RepMTL`, which has a backward pass for the saliencies. With these contexts, the function
    runs again on copies of the buffers as they were before the forward pass, and its own buffers
    stay as the forward pass left them. The copies are kept as long as the graph. Not under
    ``torch.compile``.

    Args:
        modules: the modules that the checkpointed function runs, with all submodules.

    Raises:
        TypeError: an argument is not as described.
    """
    if not modules:
        raise TypeError("modules: expected at least one torch.nn.Module, got none")
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules: expected torch.nn.Modules, got {type(module).__name__}")

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        inside = {inner for module in modules for inner in module.modules()}
        return nullcontext(), BufferCopies(inside)

    return contexts
