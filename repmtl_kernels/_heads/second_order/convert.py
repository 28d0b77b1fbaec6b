"""Modules that enter the context by themselves."""

from __future__ import annotations

from torch import Tensor, nn

from repmtl_kernels._heads.second_order.context import second_order


class _Converted(nn.Module):
    def forward(self, *args: object, **kwargs: object) -> Tensor:
        with second_order():
            return super().forward(*args, **kwargs)


# They have the names of the classes that they replace: a model prints as before.
class Conv1d(_Converted, nn.Conv1d):
    """``nn.Conv1d`` within :func:`second_order`."""


class Conv2d(_Converted, nn.Conv2d):
    """``nn.Conv2d`` within :func:`second_order`."""


class Conv3d(_Converted, nn.Conv3d):
    """``nn.Conv3d`` within :func:`second_order`."""


class ConvTranspose1d(_Converted, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` within :func:`second_order`."""


class ConvTranspose2d(_Converted, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` within :func:`second_order`."""


class ConvTranspose3d(_Converted, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` within :func:`second_order`."""


class BatchNorm1d(_Converted, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` within :func:`second_order`."""


class BatchNorm2d(_Converted, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` within :func:`second_order`."""


class BatchNorm3d(_Converted, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` within :func:`second_order`."""


class ReLU(_Converted, nn.ReLU):
    """``nn.ReLU`` within :func:`second_order`."""


CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    kind.__mro__[2]: kind for kind in _Converted.__subclasses__()
}


def convert_second_order(module: nn.Module, *, undo: bool = False) -> nn.Module:
    """Make the layers of ``module`` enter :func:`second_order` whenever they run.

    This works in place: it swaps the classes of the ``Conv*d``, ``ConvTranspose*d``,
    ``BatchNorm*d`` and ``ReLU`` layers for subclasses. Parameters, buffers, ``state_dict``, hooks
    and printed form stay. Layers of other classes, subclasses of these and ``SyncBatchNorm``
    included, are left alone. Converting twice does nothing more.

    Unlike the context, the conversion also holds where layers run again in the backward, as under
    ``torch.utils.checkpoint``. One case needs the context too: enter :func:`second_order` inside
    the checkpointed function where that calls ``F.relu`` after a batch norm and a context such as
    ``criterion.second_order()`` is around the checkpoint.

    Args:
        module: the module with all its submodules, usually a task head.
        undo: swap the classes back, e.g. before the module is pickled for a machine that doesn't
            have this package, scripted, or traced by ``torch.fx``, which looks into layers that
            are not PyTorch's own.

    Returns:
        ``module``, or its conversion where it is itself such a layer: the same object.

    Raises:
        TypeError: an argument is not as described.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(undo, bool):
        raise TypeError(f"undo: expected a bool, got {type(undo).__name__}")
    swap = {new: old for old, new in CONVERTED.items()} if undo else CONVERTED
    for layer in module.modules():
        if (kind := swap.get(type(layer))) is not None:
            layer.__class__ = kind
    return module
