"""What the ranks of a process group tell each other: all communication of the package.

In one forward pass: a few numbers about the arguments, the unit anchors, the log-sum-exps. The
backward pass has none, and so nothing in it waits for another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from repmtl_kernels._saliency import DTYPES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = "ProcessGroup | DeviceMesh | str"

_EXPECTED = (
    "group: expected None (negatives of this process), 'world', a torch.distributed.ProcessGroup "
    "or a DeviceMesh of one dimension"
)
_NO_MEMBER = "group: this process is not one of its members; call this on its members only"


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
                    "the batch is spread over, e.g. mesh['dp']"
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
    return dist.distributed_c10d._resolve_process_group(name)


class Facts(NamedTuple):
    """What each rank tells first. All but the batch has to be the same on all of them."""

    batch: int
    tasks: int
    channels: int
    dtype: torch.dtype
    with_grad: bool
    temperature: float
    eps: float


# In place of a batch: the arguments of that rank were refused.
_REFUSED = -1
_SAME = {
    "tasks": "the same number of tasks T",
    "channels": "the same number of channels C",
    "dtype": "saliencies of the same dtype",
    "with_grad": "saliencies that require a gradient, or none",
    "temperature": "the same temperature",
    "eps": "the same eps",
}


def _exchange(group: ProcessGroup, facts: Sequence[float]) -> list[list[float]]:
    """Of every rank. On the CPU where the group has a backend for it, else the host has to wait
    until the device has come to it."""
    devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    device = "cpu" if "cpu" in devices else devices[0]
    sent = torch.tensor([facts], dtype=torch.float64, device=device)
    found = sent.new_empty(dist.get_world_size(group), len(facts))
    _all_gather(found, sent, group)
    return found.tolist()


def telling(name: str) -> AbstractContextManager:
    """An error in it is told to the other ranks of the group, which would wait for this one."""
    return _telling(name) if name else nullcontext()


@contextmanager
def _telling(name: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        _exchange(_found(name), [_REFUSED] + [0] * (len(Facts._fields) - 1))
        raise


def meet(name: str, facts: Facts) -> Peers:
    """The first exchange of a forward pass. Raises on every rank or on none."""
    group = _found(name)
    everyone = _exchange(group, facts._replace(dtype=DTYPES.index(facts.dtype)))
    refusals = [rank for rank, row in enumerate(everyone) if row[0] == _REFUSED]
    if refusals:
        raise ValueError(
            f"group: ranks {refusals} of it have raised an error; theirs says what was wrong"
        )
    for field, expected in _SAME.items():
        values = [row[Facts._fields.index(field)] for row in everyone]
        if any(value != values[0] for value in values):
            told = (str(DTYPES[int(v)]) if field == "dtype" else f"{v:g}" for v in values)
            raise ValueError(
                f"group: expected {expected} on every rank; got {', '.join(told)} by rank"
            )
    sizes = tuple(int(row[0]) for row in everyone)
    return Peers(group, dist.get_rank(group), sizes)


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

    def gather(self, values: Tensor) -> Tensor:
        return self.start(values)()


def summed(values: Tensor, name: str) -> Tensor:
    """A copy, summed over the ranks."""
    total = values.clone()
    dist.all_reduce(total, group=_found(name))
    return total
