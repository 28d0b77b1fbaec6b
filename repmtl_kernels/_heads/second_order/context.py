"""The context under which convolution and batch norm get their efficient double backward."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ContextDecorator
from typing import SupportsIndex, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from repmtl_kernels._ground import torch_private
from repmtl_kernels._heads.second_order import choice
from repmtl_kernels._heads.second_order.batch_norm import batch_norm, relu
from repmtl_kernels._heads.second_order.contract import MaybeTensor
from repmtl_kernels._heads.second_order.convolution import Geometry, convolution

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
# A stride, a padding or a dilation: one for all dimensions, or one for each.
Sizes: TypeAlias = SupportsIndex | list[int] | tuple[int, ...]
Hooks: TypeAlias = tuple[Callable, Callable]


class SecondOrder(TorchFunctionMode, ContextDecorator):
    """See :func:`second_order`."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks_at_entry: list[Hooks | None] = []

    def __enter__(self) -> SecondOrder:
        self._hooks_at_entry.append(_saved_tensor_hooks())
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks_at_entry.pop()
        super().__exit__(*error)

    def __torch_function__(
        self,
        func: Callable,
        types: Iterable[type],
        args: tuple = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        result = None
        if handler is not None and _applicable() and not self._is_around_a_checkpoint():
            result = handler(*args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def _is_around_a_checkpoint(self) -> bool:
        """Return whether this runs in a checkpointed function that was called within the context.

        Such a function runs again in the backward, perhaps without the context. It would then save
        other tensors than the first time, and checkpointing would mix them up.
        """
        hooks = _saved_tensor_hooks()
        if hooks is None or hooks == self._hooks_at_entry[-1]:
            return False
        if hooks[0].__module__ != "torch.utils.checkpoint":
            return False
        warnings.warn(
            "second_order(): a checkpointed function within the context runs with PyTorch's own "
            "derivatives; enter the context inside the function, or convert its modules with "
            "convert_second_order",
            stacklevel=4,
        )
        return True


def _saved_tensor_hooks() -> Hooks | None:
    """Return the innermost (pack, unpack) of ``torch.autograd.graph.saved_tensors_hooks``."""
    if torch.compiler.is_compiling():  # no compiler traces this, and none uses the handlers
        return None
    return torch_private.saved_tensor_hooks()


def second_order() -> SecondOrder:
    """Return a context manager or decorator for the forward of the heads of a Rep-MTL step.

    Usage::

        with second_order():
            losses = [loss(head(z), y) for head, loss, y in ...]
        total = criterion(losses, z)
        total.backward()  # may run outside

    Under it convolutions (1d, 2d, 3d, transposed, of any stride, dilation, groups and padding) and
    batch norms, with a ReLU that follows one, get an efficient and exact double backward. The
    saliencies then cost one convolution for each of the forward, and the weight's gradient through
    them is the library's own weight gradient. Everything else of the model stays as it is: outputs,
    parameters, ``state_dict``, running statistics.

    On a CPU a layer has it only where it gains by it. A batch norm needs 131072 elements, and a
    convolution 2048 positions in the whole batch, or 8192 if it is transposed, or has a kernel
    larger than 1 x 1 without dilation or stride. Grouped convolutions always have it. Smaller
    layers are PyTorch's own. On other devices all sizes have it: no limit was measured there.

    Other functions are PyTorch's own. So are these functions for arguments that need no gradient,
    aren't real floating point, or are of a subclass of Tensor, and under ``torch.compile``,
    ``torch.func`` transforms, forward-mode differentiation and ``torch.jit.trace``. Backwards of
    several rows at once (``torch.vmap`` of ``torch.autograd.grad``, ``is_grads_batched``, TorchJD)
    use PyTorch's derivatives; third derivatives of batch norm have to be taken row by row.

    It holds for the thread that enters it and may be nested. Where
    ``torch.utils.checkpoint.checkpoint`` runs heads again in the backward, enter it inside the
    checkpointed function: within a context that was entered outside, the function runs with
    PyTorch's own derivatives, with a warning. Layers converted by :func:`convert_second_order`
    enter it there by themselves.

    A caller can get the gradient at the output of a batch norm before a ReLU that is not in place.
    For this, keep that output, or register a hook on it before the ReLU runs. Where the
    representation is such an output, with the ReLU in a head, enter the context for the heads only:
    a search through the graph for the representation, as TorchJD does it to find the tasks'
    parameters, would miss it otherwise.
    """
    return SecondOrder()


def _applicable() -> bool:
    """Return whether this is plain eager PyTorch; transforms and tracers have own derivatives."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not torch_private.is_transform_active()
        and torch_private.forward_mode_level() < 0
        and not torch.jit.is_tracing()
    )


def _suitable(*tensors: Tensor | None) -> bool:
    """Return whether the tensors are plain, real floating point, and one needs a gradient."""
    present = [t for t in tensors if t is not None]
    return any(isinstance(t, Tensor) and t.requires_grad for t in present) and all(
        type(t) in PLAIN_TYPES
        and t.is_floating_point()
        and t.layout is torch.strided
        and not t.is_nested
        for t in present
    )


def _convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return ``torch.conv{dims}d``; None where PyTorch has to do it, or to refuse it."""
    if not _suitable(input, weight, bias) or not _has_dims(dims, input, weight):
        return None
    stride, dilation = _each(dims, stride), _each(dims, dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if any(s != 1 for s in stride):
            return None
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            # The odd element goes to the end, as in PyTorch.
            ends = [side for total in reversed(totals) for side in (0, total % 2)]
            input = torch.constant_pad_nd(input, ends, 0)
        padding = [total // 2 for total in totals]
    elif isinstance(padding, str):
        return None
    geometry = Geometry(stride, _each(dims, padding), dilation, False, (0,) * dims, groups)
    return _batched(dims, geometry, input, weight, bias)


def _transposed_convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor | None:
    """Return ``torch.conv_transpose{dims}d``; None where PyTorch has to do it, or refuse it."""
    if not _suitable(input, weight, bias) or not _has_dims(dims, input, weight):
        return None
    stride, padding, dilation = (_each(dims, n) for n in (stride, padding, dilation))
    geometry = Geometry(stride, padding, dilation, True, _each(dims, output_padding), groups)
    return _batched(dims, geometry, input, weight, bias)


def _has_dims(dims: int, input: Tensor, weight: Tensor) -> bool:
    return input.ndim in (dims + 1, dims + 2) and weight.ndim == dims + 2


def _each(dims: int, value: Sizes) -> tuple[int, ...]:
    # PyTorch has checked the value: if it is no sequence, it is an integer, maybe NumPy's.
    sizes = tuple(value) if isinstance(value, list | tuple) else (operator.index(value),)
    return sizes * dims if len(sizes) == 1 else sizes


def _batched(
    dims: int, geometry: Geometry, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    if not choice.convolution_gains(dims, geometry, input, weight):
        return None
    device = input.device.type
    input, weight, bias = (
        _autocast(input, device),
        _autocast(weight, device),
        _autocast(bias, device),
    )
    if input.ndim == dims + 2:
        return convolution(geometry, input, weight, bias)
    return convolution(geometry, input.unsqueeze(0), weight, bias).squeeze(0)


def _autocast(tensor: MaybeTensor, device_type: str) -> MaybeTensor:
    """Return an argument of a convolution as autocast casts it."""
    if (
        tensor is None
        or not torch.amp.is_autocast_available(device_type)
        or not torch.is_autocast_enabled(device_type)
        or tensor.device.type != device_type
        or tensor.dtype == torch.float64
    ):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return ``F.batch_norm``; None where PyTorch has to do it, or to refuse it."""
    if not _suitable(input, weight, bias) or input.ndim < 2 or input.numel() == 0:
        return None
    if training:
        refused = input.numel() == input.shape[1]
    else:
        refused = running_mean is None or running_var is None
    if refused or eps <= 0 or not choice.batch_norm_gains(input):
        return None
    return batch_norm(input, running_mean, running_var, weight, bias, bool(training), momentum, eps)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor | None:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    return relu(input, inplace) if isinstance(input, Tensor) and input.requires_grad else None


def _relu_(input: Tensor) -> Tensor | None:
    return _relu(input, True)


# A handler returns None where the function itself has to be called.
HANDLERS: dict[Callable, Callable] = {
    torch.conv1d: functools.partial(_convolution, 1),
    torch.conv2d: functools.partial(_convolution, 2),
    torch.conv3d: functools.partial(_convolution, 3),
    torch.conv_transpose1d: functools.partial(_transposed_convolution, 1),
    torch.conv_transpose2d: functools.partial(_transposed_convolution, 2),
    torch.conv_transpose3d: functools.partial(_transposed_convolution, 3),
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_,
    Tensor.relu_: _relu_,
}
