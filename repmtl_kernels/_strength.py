"""How strong the regulariser is: its gradient against the tasks', seen in the one backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from repmtl_kernels import _distributed
from repmtl_kernels._saliency import accumulation_dtype

# Of the running means: they follow the last fifty observations or so.
DECAY = 0.98


class RunningMean:
    """Bias-corrected exponential mean of scalars that stay on their device.

    An observation that is not finite, or not above 0, leaves it as it was. Its two numbers are
    written in place, so that a captured CUDA graph carries them on: they are never inference
    tensors, whatever mode a checkpoint is loaded in.
    """

    def __init__(self) -> None:
        self._state: Tensor | None = None  # weighted sum of the observations, and of ones

    def value(self, device: torch.device, default: float, group: str = "") -> Tensor:
        """The mean, ``default`` before the first observation; over the ranks of a group."""
        state = self._on(device)
        total, weight = (_distributed.summed(state, group) if group else state).unbind()
        return (total / weight).where(weight > 0, default)

    @torch.no_grad()
    def observe(self, observation: Tensor) -> None:
        state = self._on(observation.device)
        added = torch.stack([observation, torch.ones_like(observation)])
        valid = observation.isfinite() & (observation > 0)
        state.copy_(torch.where(valid, DECAY * state + (1 - DECAY) * added, state))

    def numbers(self) -> list[float]:
        """For a checkpoint. Waits for the device, if there is something to wait for."""
        return [0.0, 0.0] if self._state is None else self._state.tolist()

    @torch.inference_mode(False)
    def load(self, numbers: Sequence[float]) -> None:
        new = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        self._state = new if self._state is None else self._state.copy_(new)

    def _on(self, device: torch.device) -> Tensor:
        if self._state is None or self._state.device != device:
            with torch.inference_mode(False):
                if self._state is None:
                    self._state = torch.zeros(2, dtype=torch.float32, device=device)
                else:
                    self._state = self._state.to(device)
        return self._state


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm over all elements of all tensors, at any scale: their squares may have no float32."""
    compact = [unexpanded(x) for x in tensors]
    largest = reduce(torch.maximum, [torch.linalg.vector_norm(x, torch.inf) for x in compact])
    largest = largest.to(accumulation_dtype(largest.dtype)).where(largest != 0, 1)
    norms = [torch.linalg.vector_norm(x / largest, dtype=largest.dtype) for x in compact]
    for i, (x, view) in enumerate(zip(tensors, compact, strict=True)):
        if x.numel() > view.numel():
            norms[i] = norms[i] * math.sqrt(x.numel() // view.numel())
    return largest * (norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)))


def unexpanded(x: Tensor) -> Tensor:
    """The view of ``x`` with size 1 where it is expanded."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


def share_below_float16(x: Tensor) -> Tensor:
    """The share of elements that are zero or below the normal numbers of float16, float32."""
    return (unexpanded(x.detach()).abs() < torch.finfo(torch.float16).tiny).mean(
        dtype=torch.float32
    )


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` lives inside ``torch.func``, ``vmap``, batched gradients or a compiler."""
    functorch = torch._C._functorch
    return (
        torch.compiler.is_compiling()
        or functorch.is_functorch_wrapped_tensor(x)
        or functorch.is_legacy_batchedtensor(x)  # of is_grads_batched
    )


class BackwardPass:
    """What the backward pass of one call's total brings to the representation, by hooks.

    The gradient that arrives there, minus the tasks' first-order part that the saliencies give, is
    the regulariser's. Nothing here refers to the graph, which would keep it alive. What is kept is
    one tensor of the representation's size, and by the total the representation itself, until the
    first backward pass has come by.
    """

    def __init__(self) -> None:
        self.incoming: Tensor | None = None  # d (what backward was called on) / d total
        self._pass = -1  # the backward pass of `incoming`: hooks fire in others too
        self._tasks: Tensor | None = None
        self._parts: list[Tensor] = []  # the tasks' gradient, then minus the regulariser's
        self._handles: list[RemovableHandle] = []
        self._kept: RemovableHandle | None = None
        self._missing = 0
        self._report: Callable[[Tensor], None] | None = None

    def follow(self, total: Tensor) -> None:
        """Before everything else, since all gradients here are in units of ``incoming``."""
        total.register_hook(self._begin)

    def _begin(self, grad: Tensor | None) -> None:
        if grad is None or is_transformed(grad):  # none, or several at a time
            self.incoming, self._pass = None, -1
        else:
            self.incoming, self._pass = grad.detach(), torch._C._current_graph_task_id()

    @torch.no_grad()
    def measure(
        self,
        total: Tensor,
        representations: Sequence[Tensor],
        saliencies: Sequence[Tensor],
        weights: Sequence[float],
        report: Callable[[Tensor], None],
        scale: Tensor | None = None,
    ) -> None:
        """Calls ``report``, once, with the norm of the regulariser's gradient over that of the
        tasks', each over all representations: float32, on its device. The saliencies are those of
        the losses times ``scale``."""
        parts: dict[int, Tensor] = {}
        for z, saliency, weight in zip(representations, saliencies, weights, strict=True):
            if id(z) in parts:
                parts[id(z)].add_(saliency, alpha=weight)
            else:
                dtype = accumulation_dtype(saliency.dtype)
                parts[id(z)] = saliency.to(dtype, copy=True).mul_(weight)
        if scale is not None:
            for part in parts.values():
                part.div_(scale)
        self._parts, self._report = list(parts.values()), report
        self._tasks = norm(self._parts)
        self._missing = len(parts)
        distinct = list({id(z): z for z in representations}.values())
        for index, z in enumerate(distinct):
            self._handles.append(z.register_hook(partial(self._arrive, index)))
        self._kept = total.register_hook(_Kept(distinct, self._handles))

    @torch.no_grad()
    def _arrive(self, index: int, grad: Tensor | None) -> None:
        if self._pass != torch._C._current_graph_task_id():  # e.g. that of another saliency
            return
        if grad is None:  # the nodes behind z ran, and none had a gradient for it
            self._finish()
            return
        self._handles[index].remove()
        self._parts[index].addcmul_(grad, -1 / self.incoming)
        self._missing -= 1
        if not self._missing:
            self._report((norm(self._parts) / self._tasks).float())
            self._finish()

    def _finish(self) -> None:
        self._parts, self._tasks, self._report = [], None, None
        self._kept.remove()


class _Kept:
    """A hook on the total that does nothing but live with its graph, or until it is removed.

    Until then the representations are alive: a ReLU fused with the batch norm before it sends the
    gradient through that one's output only while somebody has it. Then their hooks go: where the
    graph dies before a gradient arrives, they would pile up on a leaf.
    """

    def __init__(self, representations: list[Tensor], handles: list[RemovableHandle]) -> None:
        self.representations, self.handles = representations, handles

    def __call__(self, grad: Tensor | None) -> None:
        return None

    def __del__(self) -> None:
        for handle in self.handles:
            handle.remove()
