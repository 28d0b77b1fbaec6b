"""Modules that enter the context by themselves."""

from __future__ import annotations

from torch import nn

from repmtl_kernels._heads.second_order.context import second_order


class _Converted:
    def forward(self, *args, **kwargs):
        with second_order():
            return super().forward(*args, **kwargs)


# Named as what they replace: a model prints as before.
class Conv1d(_Converted, nn.Conv1d):
    pass


class Conv2d(_Converted, nn.Conv2d):
    pass


class Conv3d(_Converted, nn.Conv3d):
    pass


class ConvTranspose1d(_Converted, nn.ConvTranspose1d):
    pass


class ConvTranspose2d(_Converted, nn.ConvTranspose2d):
    pass


class ConvTranspose3d(_Converted, nn.ConvTranspose3d):
    pass


class BatchNorm1d(_Converted, nn.BatchNorm1d):
    pass


class BatchNorm2d(_Converted, nn.BatchNorm2d):
    pass


class BatchNorm3d(_Converted, nn.BatchNorm3d):
    pass


class ReLU(_Converted, nn.ReLU):
    pass


CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    kind.__mro__[2]: kind for kind in _Converted.__subclasses__()
}


def convert_second_order(module: nn.Module, *, undo: bool = False) -> nn.Module:
    """Makes the layers of ``module`` enter :func:`second_order` whenever they run.

    In place, by swapping the classes of its ``Conv*d``, ``ConvTranspose*d``, ``BatchNorm*d`` and
    ``ReLU`` layers for subclasses: parameters, buffers, ``state_dict``, hooks, printed form stay.
    Layers of other classes, subclasses of these and ``SyncBatchNorm`` included, are left alone.
    Converting twice does nothing more. Unlike the context it also holds where layers run again in
    the backward, as under ``torch.utils.checkpoint``. Only where the checkpointed function calls
    ``F.relu`` after a batch norm, and a context such as ``criterion.second_order()`` is around the
    checkpoint, enter :func:`second_order` inside the function too.

    Args:
        module: the module with all its submodules, usually a task head.
        undo: swap the classes back, e.g. before the whole module is pickled for a machine that
            doesn't have this package, scripted, or traced by ``torch.fx``, which looks into layers
            that are not PyTorch's own.

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
