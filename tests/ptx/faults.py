"""The one exception of the machine."""

from __future__ import annotations


class Fault(RuntimeError):
    """A kernel did what a GPU must not do, or what the machine does not know."""
