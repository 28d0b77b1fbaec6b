"""The names of the tasks, as the user gives them."""

from __future__ import annotations

from collections.abc import Sequence


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names. Raise if they are no sequence of different texts."""
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise TypeError(f"names: expected a sequence of str or None, got {type(names).__name__}")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"names[{i}]: expected a str, got {type(name).__name__}")
        if name in names[:i]:
            raise ValueError(f"names: expected different names, got {name!r} twice")
    return tuple(names)


def names_of(tasks: int, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of so many tasks; None: their numbers. Raise if they are not as many."""
    if names is None:
        return tuple(map(str, range(tasks)))
    if len(checked := checked_names(names)) != tasks:
        raise ValueError(f"names: expected {tasks}, one for each task; got {list(names)}")
    return checked
