"""Small kernels for the machine's own tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx import machine, program
from ptx.observer import Observer

_HEADER = """.version 8.7
.target sm_90a
.address_size 64
{outside}
.visible .entry tested({params})
.reqntid {threads}
{{
.reg .pred %p<40>;
.reg .b16 %h<40>;
.reg .b32 %r<400>;
.reg .b64 %d<40>;
{body}
ret;
}}
"""
# It puts the address of a thread's element of array 0, 1, ... into %d0, %d1, ...
_PLACE = """ld.param.b64 %d{i}, [a{i}];
mov.u32 %r399, %tid.x;
mad.wide.u32 %d{i}, %r399, {size}, %d{i};
"""


def run(
    body: str,
    arrays: Sequence[np.ndarray] = (),
    *,
    threads: int = 32,
    ctas: int = 1,
    shared: int = 0,
    outside: str = "",
    blob: bytes = b"",
    memory: Sequence[np.ndarray] = (),
    observer: Observer | None = None,
) -> None:
    """Run a kernel of this body, in which ``%d0``, ... point to a thread's element of each array.

    Arrays are ``(threads, ...)``, and changed in place. Registers are ``%p``, ``%h``, ``%r``,
    ``%d``. ``shared``: bytes of shared memory, whose address is 0. ``blob``: a parameter of that
    name, such as the map of a tensor in ``memory``.
    """
    params = [f".param .u64 a{i}" for i in range(len(arrays))]
    params += [f".param .align 64 .b8 blob[{len(blob)}]"] if blob else []
    places = "".join(
        _PLACE.format(i=i, size=array[0].nbytes if array.ndim > 1 else array.itemsize)
        for i, array in enumerate(arrays)
    )
    text = _HEADER.format(
        outside=outside, params=", ".join(params), threads=threads, body=places + body
    )
    machine.run(
        program.parse(text)["tested"],
        (ctas, 1, 1),
        (threads, 1, 1),
        [*(a.ctypes.data.to_bytes(8, "little") for a in arrays), *([blob] if blob else [])],
        shared=shared,
        allowed=[(a.ctypes.data, a.ctypes.data + a.nbytes) for a in (*arrays, *memory)],
        observer=observer,
    )


_REGISTERS = {1: "h", 2: "h", 4: "r", 8: "d"}


def compute(
    instruction: str, operands: Sequence[np.ndarray], result: np.dtype | type | str
) -> np.ndarray:
    """Return what an instruction makes of operands (n,), for all lanes at once.

    ``instruction`` has ``{0}`` for the destination and ``{1}``, ... for the operands.
    """
    count = len(operands[0])
    threads = -(-count // 32) * 32
    arrays = [_filled(np.zeros(count, result), threads), *(_filled(o, threads) for o in operands)]
    names, body = [], ""
    for i, array in enumerate(arrays):
        bits = 8 * array.itemsize
        # Registers of the arrays' own addresses come first.
        names.append(f"%{_REGISTERS[array.itemsize]}{20 + i}")
        if i:
            body += f"ld.global.b{bits} {names[-1]}, [%d{i}];\n"
    body += instruction.format(*names) + ";\n"
    body += f"st.global.b{8 * arrays[0].itemsize} [%d0], {names[0]};\n"
    run(body, arrays, threads=threads)
    return arrays[0][:count]


def _filled(array: np.ndarray, length: int) -> np.ndarray:
    """Return a copy with the last element repeated up to a length."""
    return np.ascontiguousarray(np.pad(array, (0, length - len(array)), mode="edge"))
