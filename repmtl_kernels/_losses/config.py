"""One evaluation of the losses, and its form as the arguments of an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple, TypeAlias, get_args, get_type_hints

from repmtl_kernels._losses.options import CsaOptions, Lambdas, TsrOptions

Constant: TypeAlias = "str | bool | int | float"
Options: TypeAlias = "TsrOptions | CsaOptions | Lambdas"


class Config(NamedTuple):
    """Everything about one evaluation but the tensors."""

    backend: str  # resolved, not "auto"
    stacked: bool
    channel_dim: int
    with_grad: bool
    tsr: TsrOptions | None  # None: without this loss
    csa: CsaOptions | None
    group: str = ""  # name of the process group whose samples are negatives; empty: this process
    # With them, and both losses, the total is one of the results. Ranks of a group compare them.
    lambdas: Lambdas | None = None

    @property
    def total(self) -> bool:
        """Return whether the total is one of the results."""
        return self.lambdas is not None and self.tsr is not None and self.csa is not None

    @property
    def recompute(self) -> bool:
        """Return whether the backward makes the Gram matrices again."""
        return self.csa is not None and self.csa.recompute

    def flat(self) -> tuple[Constant, ...]:
        """Return the arguments of an operator with :data:`SCHEMA`."""
        flat: list[Constant] = []
        for entry in _ENTRIES:
            value = getattr(self, entry.name)
            if entry.options is None:
                flat.append(value)
            else:
                flat.append(value is not None)
                options = entry.options() if value is None else value
                flat += [getattr(options, name) for name in entry.names]
        return tuple(flat)

    @staticmethod
    def from_flat(flat: Sequence[Constant]) -> Config:
        """Return the config that has these arguments."""
        arguments = iter(flat)
        values: list[Constant | Options | None] = []
        for entry in _ENTRIES:
            value = next(arguments)
            if entry.options is None:
                values.append(value)
            else:
                options = entry.options(*[next(arguments) for _ in entry.names])
                values.append(options if value else None)
        return Config._make(values)


class _Entry(NamedTuple):
    """A field of :class:`Config`."""

    name: str
    options: Callable[..., Options] | None  # their class, if the field has options or None
    names: tuple[str, ...] = ()  # of the options


def _entries() -> Iterator[_Entry]:
    for name, kind in get_type_hints(Config).items():
        if alternatives := get_args(kind):
            options = alternatives[0]
            yield _Entry(name, options, tuple(option.name for option in fields(options)))
        else:
            yield _Entry(name, None)


def _schema() -> Iterator[str]:
    """Yield the arguments of an operator. A bool says whether the options after it are set."""
    kinds = get_type_hints(Config)
    for name, options, names in _ENTRIES:
        yield f"{'bool' if options else kinds[name].__name__} {name}"
        if options is not None:
            types, prefix = get_type_hints(options), options().prefix
            yield from (f"{types[option].__name__} {prefix}{option}" for option in names)


_ENTRIES = tuple(_entries())
SCHEMA = ", ".join(_schema())
