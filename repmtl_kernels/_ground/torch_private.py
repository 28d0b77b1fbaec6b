"""The private names of PyTorch that this package uses. No other module uses one.

If a new release of PyTorch renames one, it is replaced here. Modules that are slow to load, or
absent from some builds, are imported when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import Node
from torch.utils import _pytree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "backward_hooks",
    "batch_norm_forward",
    "binary_of_torch",
    "ddp_waits_for_static_graph",
    "defined_function",
    "forward_mode_level",
    "is_compiled",
    "is_fake",
    "is_flat_parameter",
    "is_functorch_wrapped",
    "is_hook_of_fsdp1",
    "is_legacy_batched",
    "is_transform_active",
    "keeps_graph",
    "next_sequence_number",
    "process_group_named",
    "register_tuple",
    "running_backward",
    "saved_tensor_hooks",
    "sequence_number",
    "uncompiled",
    "unsharded_parameters",
    "will_be_executed",
    "without_dispatch_modes",
    "without_transforms",
    "wrapped_module",
    "writes_in_place",
]

# --- tensors ---


def is_functorch_wrapped(x: Tensor) -> bool:
    """Return whether ``x`` lives inside a transform of ``torch.func``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_legacy_batched(x: Tensor) -> bool:
    """Return whether ``x`` is a batch of gradients, as ``is_grads_batched=True`` sends them."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def backward_hooks(x: Tensor) -> MutableMapping[int, Callable]:
    """Return the hooks of ``x``. Changes to them take effect, unless there are none."""
    hooks = x._backward_hooks
    return {} if hooks is None else hooks


def register_tuple(kind: type, flatten: Callable, unflatten: Callable, name: str) -> None:
    """Make a subclass of tuple known to vmap, export and other users of PyTorch's trees."""
    _pytree.register_pytree_node(kind, flatten, unflatten, serialized_type_name=name)


# --- transforms and modes ---


def is_transform_active() -> bool:
    """Return whether a ``torch.func`` transform runs, or ``vmap`` of the older kind.

    ``Function.apply`` is not for these. In a backward pass it is the ``vmap`` of a caller who wants
    the rows of a Jacobian at once; ``is_grads_batched`` has another one.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")
    )


def forward_mode_level() -> int:
    """Return the level of forward-mode differentiation; below 0 outside of it."""
    return torch.autograd.forward_ad._current_level


def without_transforms() -> AbstractContextManager:
    """Return a context whose operations are not part of a transform of ``torch.func``."""
    return torch._C._DisableFuncTorch()


def without_dispatch_modes() -> AbstractContextManager:
    """Return a context whose operations fake tensors and tracers don't see."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


# --- the autograd engine ---


def running_backward() -> bool:
    """Return whether this is called in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def will_be_executed(node: Node) -> bool:
    """Return whether the backward pass that is running will come to ``node``."""
    return torch._C._will_engine_execute_node(node)


def keeps_graph() -> bool:
    """Return whether the backward pass that is running has ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def saved_tensor_hooks() -> tuple[Callable, Callable] | None:
    """Return the innermost (pack, unpack) of ``torch.autograd.graph.saved_tensors_hooks``."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def sequence_number(node: Node) -> int:
    """Return the number of ``node``: nodes that were made later have a larger one."""
    return node._sequence_nr()


def next_sequence_number() -> int:
    """Return the number that the next node of this thread gets."""
    return torch.autograd._get_sequence_nr()


def defined_function(node: Node) -> type[torch.autograd.Function]:
    """Return the ``autograd.Function`` that made ``node``."""
    return node._forward_cls  # type: ignore[attr-defined]


# --- modules and tensors of heads ---


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` or ``module.compile`` made it compiled."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def writes_in_place(x: Tensor) -> int:
    """Return how often ``x`` was written in place."""
    return x._version


# --- operations and libraries ---


def batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return result, mean and inverse standard deviation, the last two empty outside training."""
    result, mean, invstd, *_ = torch._batch_norm_impl_index(
        x, weight, bias, running_mean, running_var,
        training, momentum, eps, torch.backends.cudnn.enabled,
    )  # fmt: skip
    return result, mean, invstd


def binary_of_torch() -> str:
    """Return the path of a library of PyTorch that is loaded, and so is for this machine."""
    return torch._C.__file__


# --- distributed training ---


def process_group_named(name: str) -> ProcessGroup:
    """Return the group that has this ``group_name``."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def wrapped_module(node: Node) -> DistributedDataParallel:
    """Return the ``DistributedDataParallel`` that a ``_DDPSink`` node belongs to."""
    return node.ddp_weakref()  # type: ignore[attr-defined]


def ddp_waits_for_static_graph(wrapper: nn.Module) -> bool:
    """Return whether DDP will learn its static graph from the next backward pass."""
    return bool(wrapper.static_graph and not wrapper._static_graph_delay_allreduce_enqueued)


def is_hook_of_fsdp1(hook: Any) -> bool:
    """Return whether FullyShardedDataParallel (FSDP1) put this hook on a tensor."""
    function = getattr(hook, "func", hook)  # it is a partial
    return getattr(function, "__module__", "") == "torch.distributed.fsdp._runtime_utils"


def is_flat_parameter(parameter: Tensor) -> bool:
    """Return whether it is one of FullyShardedDataParallel (FSDP1)."""
    return getattr(parameter, "_is_flat_param", False)


def unsharded_parameters(hook: Any) -> Iterator[Tensor]:
    """Return the parameters as computations see them, for all modules of a fully_shard hook."""
    state = getattr(hook, "__self__", None)
    if state is None or not hasattr(state, "_state_ctx"):
        return
    for other in state._state_ctx.all_states:
        for group in _parameter_groups(other):
            for parameter in group.fsdp_params:
                if hasattr(parameter, "_unsharded_param"):
                    yield parameter._unsharded_param


def _parameter_groups(state: Any) -> Iterable[Any]:
    """Return the groups: newer versions of PyTorch have a list, older ones have one or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [g for g in [state._fsdp_param_group] if g is not None]
