"""The arguments of ``RepMTL.check``: heads, and a representation for each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from repmtl_kernels._losses.arguments import check_saliencies
from repmtl_kernels._training.arguments import SHARED, Representation, Shared
from repmtl_kernels._training.levels import Levels

Head: TypeAlias = Callable[[Any], object]
Heads: TypeAlias = Head | Sequence[Head] | Mapping[Hashable, Head] | nn.ModuleList | nn.ModuleDict


def named_heads(heads: Heads) -> dict[str, Head]:
    """Return the heads by the names that messages use."""
    named: dict[str, object]
    if isinstance(heads, Mapping | nn.ModuleDict):
        named = {f"heads[{key!r}]": head for key, head in heads.items()}
    elif isinstance(heads, list | tuple | nn.ModuleList):
        named = {f"heads[{i}]": head for i, head in enumerate(heads)}
    else:
        named = {"heads": heads}
    if not named:
        raise ValueError(f"heads: expected at least one, got an empty {type(heads).__name__}")
    checked: dict[str, Head] = {}
    for name, head in named.items():
        if not callable(head):
            swapped = ". Are they swapped? The heads come first" if isinstance(head, Tensor) else ""
            raise TypeError(
                f"{name}: expected a module or a function of the representation, got "
                f"{type(head).__name__}{swapped}"
            )
        checked[name] = head
    return checked


def one_for_each(z: Representation, heads: Heads, count: int, channel_dim: int) -> list[Shared]:
    """Return the representation of each of the ``count`` heads, in their order."""
    values: dict[str, Shared]
    if isinstance(z, Tensor | Levels):
        values = {"z": z}
    elif isinstance(z, Mapping) and isinstance(heads, Mapping | nn.ModuleDict):
        if set(z) != set(heads):
            raise ValueError(f"z: expected the keys of heads, {list(heads)}; got {list(z)}")
        values = {f"z[{key!r}]": z[key] for key in heads}
    elif isinstance(z, list | tuple) and isinstance(heads, list | tuple | nn.ModuleList):
        if len(z) != count:
            raise ValueError(f"z: expected {count}, one for each head; got {len(z)}. {SHARED}")
        values = {f"z[{i}]": value for i, value in enumerate(z)}
    else:
        raise TypeError(
            f"z: expected a Tensor, or one for each head in a container like heads "
            f"({type(heads).__name__}), or Levels; got {type(z).__name__}"
        )
    for name, value in values.items():
        if isinstance(value, Levels):
            places = [(f"{name}[{level!r}]", tensor) for level, tensor in value.items()]
        else:
            places = [(name, value)]
        for place, tensor in places:
            if isinstance(tensor, Tensor) and not tensor.is_floating_point():
                raise TypeError(f"{place}: expected a floating-point Tensor, got {tensor.dtype}")
            check_saliencies([tensor], channel_dim, place, [place])
    return list(values.values()) * (count if isinstance(z, Tensor | Levels) else 1)
