"""Several representations that tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import SupportsIndex, overload

from torch import Tensor

from repmtl_kernels._ground.torch_private import register_tuple


class Levels(tuple[Tensor, ...]):
    """Several representations that all tasks share, such as the levels of a feature pyramid.

    ::

        p3, p4, p5 = encoder(x)
        total = criterion(losses, Levels(p3, p4, p5))

    Every task has a saliency at every level, and the regulariser is the mean over the levels of TSR
    and CSA at each. A plain list means something else: multi-input learning, with one
    representation for each task.

    It is a tuple of its tensors: heads can unpack it, index it and loop over it. Where the levels
    have names, ``levels["p3"]`` works too.

    Args:
        levels: tensors ``(B, C, *spatial)`` of one dtype and device, whose other sizes may differ;
            or one list, tuple or dict of them.
        named: the same by name, e.g. ``Levels(p3=p3, p4=p4)``.

    Raises:
        ValueError, TypeError: there are no levels, a level is not a Tensor, or the same tensor is
            given twice.
    """

    names: tuple[str | int, ...]
    """The names that messages use: those given, or the indices where none were."""

    def __new__(
        cls, *levels: Tensor | Iterable[Tensor] | Mapping[str, Tensor], **named: Tensor
    ) -> Levels:
        if levels and named:
            raise TypeError("levels: expected tensors in order or tensors by name, got both")
        given: object = levels
        if len(levels) == 1 and not isinstance(levels[0], Tensor):
            given = levels[0]
        by_name: dict[str | int, Tensor] = {}
        if isinstance(given, Mapping):
            for name in given:
                if not isinstance(name, str):
                    raise TypeError(
                        f"levels: expected a dict with names as keys, got the key {name!r}. Pass a "
                        "list of levels that have none"
                    )
            by_name = dict(given)
        elif named:
            by_name.update(named)
        else:
            if not isinstance(given, Iterable) or isinstance(given, str | bytes):
                raise TypeError(
                    "levels: expected Tensors, or one list or dict of them; got "
                    f"{type(given).__name__}"
                )
            names: Iterable[str | int] = given.names if isinstance(given, Levels) else count()
            by_name = dict(zip(names, given, strict=False))
        seen: dict[int, str | int] = {}
        for name, level in by_name.items():
            if not isinstance(level, Tensor):
                raise TypeError(f"levels[{name!r}]: expected a Tensor, got {type(level).__name__}")
            if id(level) in seen:
                raise ValueError(
                    f"levels[{name!r}]: expected another tensor for each level, got that of "
                    f"levels[{seen[id(level)]!r}] again"
                )
            seen[id(level)] = name
        if not by_name:
            raise ValueError("levels: expected at least one Tensor, got none")
        self = super().__new__(cls, by_name.values())
        self.names = tuple(by_name)
        return self

    @overload
    def __getitem__(self, key: str | SupportsIndex) -> Tensor: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, key: str | SupportsIndex | slice) -> Tensor | tuple[Tensor, ...]:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self.names:
            raise KeyError(f"{key!r}: the levels are {list(self.names)}")
        return super().__getitem__(self.names.index(key))

    def __contains__(self, item: object) -> bool:
        """Return whether it is the name of a level, or a level."""
        return item in self.names if isinstance(item, str) else any(item is z for z in self)

    def __repr__(self) -> str:
        shown = (f"{name}: {tuple(level.shape)}" for name, level in self.items())
        return f"Levels({', '.join(shown)})"

    def items(self) -> Iterator[tuple[str | int, Tensor]]:
        """The levels with their names, in order."""
        return zip(self.names, self, strict=True)

    def keys(self) -> tuple[str | int, ...]:
        """The names."""
        return self.names

    def values(self) -> tuple[Tensor, ...]:
        """The levels."""
        return tuple(self)

    def like(self, levels: Iterable[Tensor]) -> Levels:
        """Other tensors under the same names."""
        return _from_leaves(levels, self.names)

    # LibMTL's architectures give each task `representation.detach().clone()` as a leaf.

    def detach(self) -> Levels:
        """Each level detached."""
        return self.like(level.detach() for level in self)

    def clone(self) -> Levels:
        """Each level cloned."""
        return self.like(level.clone() for level in self)

    @property
    def requires_grad(self) -> bool:
        """Whether every level requires a gradient; may be set on leaves."""
        return all(level.requires_grad for level in self)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Levels:
        """Sets it on each level; returns these levels."""
        for level in self:
            level.requires_grad_(requires_grad)
        return self


def _from_leaves(levels: Iterable[Tensor], names: Sequence[str | int]) -> Levels:
    """Levels of other leaves, unchecked: a transform may put anything in the tensors' place."""
    made = tuple.__new__(Levels, levels)
    made.names = tuple(names)
    return made


# So that vmap, export and optimisers of a tree's leaves take them as they take a tuple.
register_tuple(
    Levels,
    lambda levels: (list(levels), levels.names),
    _from_leaves,
    "repmtl_kernels.Levels",
)


def levels_of(representation: Tensor | Levels) -> list[Tensor]:
    """The tensors of a representation: one, or that of each level."""
    return list(representation) if isinstance(representation, Levels) else [representation]
