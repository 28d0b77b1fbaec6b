"""Which unit of a multiprocessor executes an instruction."""

from __future__ import annotations

import functools

FREE = "free"  # ptxas makes nothing of it, or an operand of another instruction
CLASSES = (
    "fp32", "int", "conversion", "control", "memory", "matrix", "special", "shuffle"
)  # fmt: skip

_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div", "rem")
_CONTROL = (
    "bra", "ret", "exit", "bar", "barrier", "membar", "fence", "mbarrier", "elect", "brx", "call",
    "griddepcontrol", "nanosleep", "trap", "pragma", "setmaxnreg",
)  # fmt: skip
_MEMORY = (
    "ld", "st", "cp", "ldmatrix", "stmatrix", "atom", "red", "prefetch", "discard", "ldu"
)  # fmt: skip
_SHUFFLE = ("shfl", "vote", "match", "redux", "activemask")
_FLOAT_TYPES = ("f32", "f16", "f16x2", "bf16", "bf16x2", "f64", "f32x2")


@functools.cache
def class_of(op: str, modifiers: tuple[str, ...]) -> str:
    """Return one of :data:`CLASSES`, or :data:`FREE`."""
    types = [m for m in modifiers if m in _FLOAT_TYPES]
    if op == "mov" or op == "cvta" or (op == "ld" and "param" in modifiers):
        return FREE
    if op in ("mma", "wgmma"):
        return "control" if modifiers[0] in ("fence", "commit_group", "wait_group") else "matrix"
    if op == "cp" and ("commit_group" in modifiers or "wait_group" in modifiers):
        return "control"
    if op in _CONTROL:
        return "control"
    if op in _MEMORY:
        return "memory"
    if op in _SHUFFLE:
        return "shuffle"
    if op == "cvt":
        return "conversion" if types else FREE if _widens(modifiers) else "int"
    if op in _SPECIAL:
        return "special" if types else "int"
    return "fp32" if types else "int"


def _widens(modifiers: tuple[str, ...]) -> bool:
    """Return whether an integer gets as wide as another, or wider, without a sign."""
    to, source = modifiers[-2:]
    return int(to[1:]) >= int(source[1:]) and source[0] in "ub"
