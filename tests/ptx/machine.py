"""Runs a launch: all threads of all CTAs side by side, in lockstep.

A *lane* is a thread of the launch; lanes of a CTA are neighbours, filled up to whole warps. Where
lanes part, those with the least place in the program run first, so that they meet again. A barrier
holds lanes until all of their CTA are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ptx.faults import Fault
from ptx.global_memory import GlobalMemory
from ptx.instructions import decode
from ptx.instructions.bulk_copies import BulkCopies
from ptx.instructions.copies import Copies
from ptx.instructions.warpgroup import Products
from ptx.kernel import Immediate, Instruction, Kernel
from ptx.local_memory import LocalMemory
from ptx.observer import Observer
from ptx.shared_memory import SharedMemory

WARP = 32
RUNNING, WAITING, ENDED = 0, 1, 2

Extent = tuple[int, int, int]
# Which lanes an instruction is for: None is all lanes of the launch.
Active = np.ndarray | None


def run(
    kernel: Kernel,
    grid: Extent,
    block: Extent,
    arguments: Sequence[bytes],
    *,
    shared: int,
    allowed: Sequence[tuple[int, int]],
    observer: Observer | None = None,
    only: Callable[[int, int, int], bool] | None = None,
    races: bool = True,
) -> None:
    """Run the CTAs of a launch for which ``only(x, y, z)`` is true.

    ``arguments`` are the parameters' bytes, ``shared`` the bytes of dynamic shared memory,
    ``allowed`` the ``(first, end)`` addresses that it may touch. Raises Fault.
    """
    if kernel.block not in (None, block[0] * block[1] * block[2]):
        raise Fault(f"{kernel.name}: launched with {block} threads, requires {kernel.block}")
    places = [
        (x, y, z)
        for z in range(grid[2])
        for y in range(grid[1])
        for x in range(grid[0])
        if only is None or only(x, y, z)
    ]
    if places:
        Machine(kernel, grid, block, places, arguments, shared, allowed, observer, races).run()


class Machine:
    """The state of a launch."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Extent,
        block: Extent,
        places: Sequence[Extent],
        arguments: Sequence[bytes],
        shared: int,
        allowed: Sequence[tuple[int, int]],
        observer: Observer | None,
        races: bool,
    ) -> None:
        self.kernel, self.grid, self.block, self.observer = kernel, grid, block, observer
        threads = block[0] * block[1] * block[2]
        self.threads = -(-threads // WARP) * WARP  # of a CTA, with those that fill up its last warp
        self.ctas = len(places)
        self.lanes = self.ctas * self.threads
        lane = np.arange(self.lanes)
        self.cta = lane // self.threads
        self.thread = lane % self.threads
        self.lane_in_warp = (lane % WARP).astype(np.uint32)
        self.places = np.array(places, np.uint32)
        self.registers: list[np.ndarray | None] = [None] * kernel.registers
        self.written = [0] * kernel.registers  # when
        self.clock = 0
        places_of_shared, dynamic = kernel.shared_layout()
        places_of_local, local = kernel.local_layout()
        params, self.first_param, places_of_params = _param_memory(kernel, arguments)
        self.symbols = places_of_shared | places_of_local | places_of_params
        self.shared_bytes = dynamic + shared
        self.memory = GlobalMemory(
            self, (*allowed, (self.first_param, self.first_param + params.nbytes))
        )
        self.param_bytes = params.nbytes
        self._params = params  # its memory has to last
        self.shared = SharedMemory(self, self.shared_bytes, kernel, races)
        self.local = LocalMemory(self, local)
        self.copies = Copies(self)
        self.bulk_copies = BulkCopies(self)
        self.products = Products(self)
        if not kernel.steps:
            kernel.steps += map(decode, kernel.instructions)
        self.steps = kernel.steps
        self.state = np.where(self.thread < threads, RUNNING, ENDED)
        self.pc = np.zeros(self.lanes, np.int64)
        self.barrier = np.zeros(self.lanes, np.int64)  # which one a lane waits at

    def run(self) -> None:
        if self.observer:
            observed = self.kernel, self.grid, self.block, self.shared_bytes, self.ctas
            self.observer.start(*observed)
        try:
            with np.errstate(all="ignore"):
                while True:
                    running = self.state == RUNNING
                    if running.any():
                        self._advance(running)
                    elif (self.state == WAITING).any():
                        self._release()
                    else:
                        break
            self.shared.end()
            self.copies.end()
            self.products.end()
        except Fault as fault:
            raise Fault(f"{self.kernel.name}: {fault}") from None
        if self.observer:
            self.observer.finish()

    def _advance(self, running: np.ndarray) -> None:
        """Run the lanes of the least place until they part, wait, end or reach other lanes."""
        pcs = np.where(running, self.pc, len(self.steps))
        pc = int(pcs.min())
        lanes = running & (pcs == pc)
        others = pcs[running & ~lanes]
        meeting = int(others.min()) if others.size else None
        active = None if lanes.all() else lanes
        warps = int(lanes.reshape(-1, WARP).any(1).sum())
        instructions, steps = self.kernel.instructions, self.steps
        while True:
            if pc >= len(steps):
                raise Fault("runs past its end")
            instruction = instructions[pc]
            self.clock += 1
            where: Active | bool = active
            if instruction.guard is not None:
                where = self._guarded(instruction.guard.number, instruction.negated, active)
            if self.observer:
                self.observer.issued(instruction, warps)
            following = pc + 1
            if instruction.op == "bra":
                if where is active:
                    following = instruction.target
                elif where is not False:
                    self.pc[lanes] = following
                    self.pc[lanes & where] = instruction.target
                    return
            elif instruction.op in ("ret", "exit"):
                if where is not False:
                    self.pc[lanes] = following
                    self.state[lanes if where is active else lanes & where] = ENDED
                    return
            elif instruction.op in ("bar", "barrier") and instruction.modifiers[:1] == ("sync",):
                if where is not active:
                    raise Fault(f"a barrier for some lanes only: {instruction.text}")
                if not self._arrive(instruction, lanes):
                    self.pc[lanes] = following
                    return
            elif where is not False:
                try:
                    steps[pc](self, where)
                except Fault as fault:
                    raise Fault(f"{fault} (instruction {pc}: {instruction.text})") from None
            # Back in a loop there may be others behind: they go first.
            if meeting is not None and (following >= meeting or following < pc):
                self.pc[lanes] = following
                return
            pc = following

    def _guarded(self, number: int, negated: bool, active: Active) -> Active | bool:
        """Return the active lanes that a predicate lets through; False for none of them."""
        predicate = self.registers[number]
        if predicate is None:
            raise Fault("a predicate that nothing wrote")
        if predicate.ndim == 0:
            return active if bool(predicate) != negated else False
        passed = ~predicate if negated else predicate
        if active is None:
            return None if passed.all() else (passed if passed.any() else False)
        both = passed & active
        if np.array_equal(both, active):
            return active
        return both if both.any() else False

    def _arrive(self, instruction: Instruction, lanes: np.ndarray) -> bool:
        """Have lanes arrive at a barrier; return whether their CTAs have passed it."""
        number, *count = instruction.operands or (Immediate(0),)
        if count and count[0] != Immediate(self.threads):
            raise Fault(f"a barrier for a part of the CTA: {instruction.text}")
        if not isinstance(number, Immediate):
            raise Fault(f"a barrier by a register: {instruction.text}")
        if self._are_whole_ctas(lanes):
            self.shared.barrier(lanes)
            return True
        self.state[lanes] = WAITING
        self.barrier[lanes] = number.value
        return False

    def _are_whole_ctas(self, lanes: np.ndarray) -> bool:
        """Return whether these are all threads of some CTAs, and none of the others."""
        threads = self.block[0] * self.block[1] * self.block[2]
        return bool(np.isin(np.bincount(self.cta[lanes]), (0, threads)).all())

    def _release(self) -> None:
        """Open the barriers: no lane runs any more."""
        waiting = self.state == WAITING
        if not self._are_whole_ctas(waiting):
            raise Fault("some threads of a CTA have ended, others wait at a barrier")
        first = np.zeros(self.ctas, np.int64)
        first[self.cta[waiting]] = self.barrier[waiting]
        if (first[self.cta[waiting]] != self.barrier[waiting]).any():
            raise Fault("threads of a CTA wait at different barriers")
        self.shared.barrier(waiting)
        self.state[waiting] = RUNNING

    # For the instructions.

    def write(self, number: int, value: np.ndarray, where: Active) -> None:
        """Write a register, in the lanes that are active."""
        self.written[number] = self.clock
        if where is not None:
            old = self.registers[number]
            if old is None:
                old = poison(value.dtype)
            value = np.where(where, value, old)
        self.registers[number] = value

    def spread(self, value: np.ndarray) -> np.ndarray:
        """Return a value for each lane."""
        return value if value.ndim else np.broadcast_to(value, self.lanes)

    def whole_warps(self, where: Active, what: str) -> np.ndarray:
        """Return which warps (lanes / 32,) take part; a warp takes part with all its lanes."""
        if where is None:
            return np.ones(self.lanes // WARP, bool)
        by_warp = where.reshape(-1, WARP)
        some, every = by_warp.any(1), by_warp.all(1)
        if not np.array_equal(some, every):
            raise Fault(f"{what} of a part of a warp")
        return every


def poison(dtype: np.dtype) -> np.ndarray:
    """Return what lies where nobody wrote: ones, which are NaN as a float."""
    if dtype == np.bool_:
        return np.zeros((), bool)
    return np.full((), np.iinfo(dtype).max, dtype)


def _param_memory(
    kernel: Kernel, arguments: Sequence[bytes]
) -> tuple[np.ndarray, int, dict[str, int]]:
    """Return memory with the parameters, its address, and the place of each in it."""
    if len(arguments) != len(kernel.params):
        raise Fault(f"{len(arguments)} arguments for {len(kernel.params)} parameters")
    room = np.zeros(sum(param.bytes + 128 for param in kernel.params) + 128, np.uint8)
    memory = room[-room.ctypes.data % 128 :]
    places, end = {}, 0
    for param, value in zip(kernel.params, arguments, strict=True):
        if len(value) != param.bytes:
            raise Fault(f"{param.name}: {len(value)} bytes for a parameter of {param.bytes}")
        places[param.name] = -(-end // param.align) * param.align
        end = places[param.name] + param.bytes
        memory[places[param.name] : end] = np.frombuffer(value, np.uint8)
    return memory, memory.ctypes.data, places
