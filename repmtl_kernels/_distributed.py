"""What the ranks of a process group tell each other: all communication of the package.

In one forward pass: a few numbers about the arguments, the unit anchors, two numbers for each of
the log-sum-exps. The backward pass has none, and so nothing in it waits for another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from repmtl_kernels._ground import torch_private
from repmtl_kernels._ground.saliency import DTYPES, NORMALIZERS, OVER

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = "ProcessGroup | DeviceMesh | str"

_EXPECTED = (
    "group: expected None (negatives of this process), 'world', a torch.distributed.ProcessGroup "
    "or a DeviceMesh of one dimension"
)
_NO_MEMBER = (
    "group: expected one that this process is a member of; got one without it. Call this on its "
    "members only"
)


def check_group(group: Group | None) -> None:
    """What can be told of it before there are processes."""
    if group is None or (isinstance(group, str) and group == "world"):
        return
    if isinstance(group, str):
        raise ValueError(f"{_EXPECTED}; got {group!r}")
    if dist.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, dist.ProcessGroup):
            return
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"{_EXPECTED}; got a DeviceMesh of {group.ndim} dimensions. Take the one that "
                    "the batch is spread over, e.g. mesh['dp'], or where that is several a mesh "
                    "of all ranks that share the batch"
                )
            return
        if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(_NO_MEMBER)
    raise TypeError(f"{_EXPECTED}; got {type(group).__name__}")


def name_of(group: Group | None) -> str:
    """The name that :func:`meet` finds the group by; empty where this process is on its own."""
    check_group(group)
    if group is None:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected an initialised torch.distributed; call init_process_group() first, or "
            "pass None (negatives of this process)"
        )
    if group == "world":
        group = dist.group.WORLD
    elif not isinstance(group, dist.ProcessGroup):
        if group.get_coordinate() is None:
            raise ValueError(_NO_MEMBER)
        group = group.get_group()
    if dist.get_rank(group) < 0:
        raise ValueError(_NO_MEMBER)
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _all_gather(found: Tensor, sent: Tensor, group: ProcessGroup, async_op: bool = False):
    # The second name is that of PyTorch before 2.13, and deprecated since.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(found, sent, group=group, async_op=async_op)


def _found(name: str) -> ProcessGroup:
    return torch_private.process_group_named(name)


class Facts(NamedTuple):
    """What each rank tells before its anchors. All but the batch has to be the same on all."""

    batch: int
    tasks: int
    channels: int
    dtype: int  # its place in DTYPES
    with_grad: bool
    positions: bool  # whether a mask of them is given
    temperature: float
    eps: float
    tsr: bool
    over: int  # these four: of TSR
    normalizer: int
    tsr_temperature: float
    tsr_floor: float
    lambda_tsr: float
    lambda_csa: float


class Options(NamedTuple):
    """What each rank's criterion tells before it takes part in anything. None is told as -1."""

    calls: int
    lambda_tsr: float
    lambda_csa: float
    strength: float
    start: int
    ramp: int
    every: int
    over: int
    normalizer: int
    tsr_temperature: float
    tsr_floor: float
    csa_temperature: float
    eps: float
    log_losses: bool
    log_offset: float
    clip: float


# What a rank tells, as the first number of it.
_REFUSED, _FACTS, _OPTIONS = 0, 1, 2
# Numbers that a rank tells at a time, always as many: an error fits in place of anything.
WIDTH = 1 + max(len(Facts._fields), len(Options._fields))
_SAME = {
    "tasks": "the same number of tasks T",
    "channels": "the same number of channels C",
    "dtype": "saliencies of the same dtype",
    "with_grad": "saliencies that require a gradient, or none",
    "positions": "a mask of positions, or none,",
    "tsr": "the same loss, csa_loss or rep_mtl_loss,",
    "calls": "the same number of training calls before this one",
}
_REMEDY = {"calls": ". Load the checkpoint on every rank, not on one, and skip a batch on all"}


def _exchange(group: ProcessGroup, told: Sequence[float], near: object) -> list[list[float]]:
    """Of every rank. On the CPU where the group has a backend for it, else the host has to wait
    until the device has come to it."""
    row = [*map(float, told), *[0.0] * (WIDTH - len(told))]
    with torch_private.without_transforms():
        sent = torch.tensor([row], dtype=torch.float64, device=_device(group, near))
        found = sent.new_empty(dist.get_world_size(group), WIDTH)
        _all_gather(found, sent, group)
        return found.tolist()


def _device(group: ProcessGroup, near: object) -> torch.device:
    """One that the group has a backend for; of several GPUs that of the tensors in ``near``, since
    the current one may be another rank's."""
    types = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if "cpu" in types:
        return torch.device("cpu")
    if (bound := getattr(group, "bound_device_id", None)) is not None:
        return bound
    return next(_devices(near, types[0]), torch.device(types[0]))


def _devices(value: object, kind: str) -> Iterator[torch.device]:
    if isinstance(value, Tensor):
        if value.device.type == kind:
            yield value.device
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _devices(item, kind)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _devices(item, kind)


def telling(name: str, near: object) -> AbstractContextManager:
    """An error in it is told to the other ranks of the group, which would wait for this one.

    ``near``: the arguments, on whose device that is."""
    return _telling(name, near) if name else nullcontext()


@contextmanager
def _telling(name: str, near: object) -> Iterator[None]:
    try:
        yield
    except Exception:
        _exchange(_found(name), [_REFUSED], near)
        raise


def agree(name: str, options: Options, near: object) -> None:
    """That all ranks have these options. Raises on every rank or on none."""
    _same(_found(name), _OPTIONS, options, near)


def meet(name: str, facts: Facts, near: object) -> Peers:
    """The first exchange of a forward pass. Raises on every rank or on none."""
    group = _found(name)
    sizes = tuple(f.batch for f in _same(group, _FACTS, facts, near))
    return Peers(group, dist.get_rank(group), sizes)


def _same(group: ProcessGroup, kind: int, told: Facts | Options, near: object) -> list:
    rows = _exchange(group, [kind, *told], near)
    refusals = [rank for rank, row in enumerate(rows) if row[0] == _REFUSED]
    if refusals:
        raise ValueError(
            f"group: ranks {refusals} of it have raised an error; theirs says what was wrong"
        )
    if any(row[0] != kind for row in rows):
        raise ValueError(
            "group: expected the same calls in the same order on every rank; got a criterion's on "
            f"ranks {[r for r, row in enumerate(rows) if row[0] == _OPTIONS]}, one of the losses' "
            f"on ranks {[r for r, row in enumerate(rows) if row[0] == _FACTS]}"
        )
    everyone = [type(told)(*row[1 : 1 + len(told)]) for row in rows]
    for field in type(told)._fields:
        values = [getattr(other, field) for other in everyone]
        if field != "batch" and any(value != values[0] for value in values):
            shown = ", ".join(_shown(field, value) for value in values)
            raise ValueError(
                f"group: expected {_SAME.get(field, f'the same {field}')} on every rank; got "
                f"{shown} by rank{_REMEDY.get(field, '')}"
            )
    return [other._replace(batch=int(other.batch)) for other in everyone] if kind == _FACTS else []


def _shown(field: str, value: float) -> str:
    choices = {"dtype": DTYPES, "over": OVER, "normalizer": NORMALIZERS}
    if field in choices:
        return str(choices[field][int(value)])
    if value < 0:
        return "None"
    return f"{value:.0f}" if value.is_integer() else f"{value:g}"


class Peers(NamedTuple):
    """The ranks of a group and the number of samples that each of them has."""

    group: ProcessGroup
    rank: int
    sizes: tuple[int, ...]

    @property
    def first(self) -> int:
        """The number of this rank's first sample among those of all."""
        return sum(self.sizes[: self.rank])

    @property
    def share(self) -> float:
        """What a mean over this rank's samples is multiplied with, for the plain average over the
        ranks to be the mean over all samples; 1 where all have as many."""
        return len(self.sizes) * self.sizes[self.rank] / sum(self.sizes)

    def start(self, values: Tensor) -> Callable[[], Tensor]:
        """Sends (B, ...); the result waits, and gives those of all ranks (G, ...)."""
        most = max(self.sizes)
        sent = values.contiguous()
        if len(values) < most:  # pieces have to be of one size
            sent = values.new_zeros(most, *values.shape[1:])
            sent[: len(values)] = values
        found = sent.new_empty(len(self.sizes) * most, *sent.shape[1:])
        work = _all_gather(found, sent, self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            if min(self.sizes) == most:
                return found
            pieces = zip(found.split(most), self.sizes, strict=True)
            return torch.cat([piece[:size] for piece, size in pieces])

        return finish

    def largest(self, values: Tensor) -> Tensor:
        """Each element is the largest one of all ranks."""
        return _reduced(values, self.group, dist.ReduceOp.MAX)

    def summed(self, values: Tensor) -> Tensor:
        return _reduced(values, self.group, dist.ReduceOp.SUM)


def summed(values: Tensor, name: str) -> Tensor:
    """A copy, summed over the ranks."""
    return _reduced(values, _found(name), dist.ReduceOp.SUM)


def _reduced(values: Tensor, group: ProcessGroup, op: dist.ReduceOp) -> Tensor:
    total = values.clone()
    dist.all_reduce(total, op, group=group)
    return total
