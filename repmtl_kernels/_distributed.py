"""The ranks of a process group: all communication of the package.

One forward pass exchanges a few numbers about the arguments, the unit anchors, and two numbers for
each of the log-sum-exps. The backward pass sends nothing, so nothing in it waits for another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, SupportsFloat, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from repmtl_kernels._ground import torch_private

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


def check_group(group: object) -> None:
    """Raise if this can't be a group. Needs no processes."""
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
    """Return the group's name for the functions below; empty if this process is on its own."""
    check_group(group)
    if group is None:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected an initialised torch.distributed; call init_process_group() first, or "
            "pass None (negatives of this process)"
        )
    members = _process_group(group)
    if members is None or dist.get_rank(members) < 0:
        raise ValueError(_NO_MEMBER)
    return members.group_name if dist.get_world_size(members) > 1 else ""


def _process_group(group: Group) -> ProcessGroup | None:
    """Return None for a mesh that this process is not in."""
    if isinstance(group, str):
        return dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):
        return group
    return None if group.get_coordinate() is None else group.get_group()


class Fact(NamedTuple):
    """A value that must be the same on all ranks."""

    value: SupportsFloat | str | None  # a number of at least 0, or one of the choices
    expected: str  # how a message calls it, e.g. "the same eps"
    choices: Sequence[str] = ()
    remedy: str = ""

    def number(self) -> float:
        """Return the number that stands for the value in a message to the other ranks."""
        if isinstance(self.value, str):
            return float(self.choices.index(self.value))
        return -1.0 if self.value is None else float(self.value)

    def text(self, number: float) -> str:
        """Return the text of the value that ``number`` stands for."""
        if self.choices:
            return self.choices[int(number)]
        if number < 0:
            return "None"
        return f"{number:.0f}" if number.is_integer() else f"{number:g}"


# The numbers that a rank sends in one message. All messages are as long, so that an error can come
# in place of any of them. A new option that ranks compare may need a larger number.
WIDTH = 18
# The first number of a message: its kind.
_ERROR, _LOSSES, _CRITERION = 0, 1, 2


@contextmanager
def _errors_shared(name: str, like: object) -> Iterator[None]:
    try:
        yield
    except Exception:
        _exchange(torch_private.process_group_named(name), [_ERROR], like)
        raise


def errors_shared(name: str, like: object) -> AbstractContextManager:
    """Return a context that reports an error in it to the other ranks, which wait for this one.

    Args:
        name: the group's, from :func:`name_of`.
        like: tensors, or containers of them: the exchange is on their device.
    """
    return _errors_shared(name, like) if name else nullcontext()


@contextmanager
def _meeting(name: str, like: object, facts: Sequence[Fact]) -> Iterator[None]:
    with _errors_shared(name, like):
        yield
    agree(name, facts, like)


def meeting(name: str, like: object, facts: Sequence[Fact]) -> AbstractContextManager:
    """Return a context that all ranks leave with the same facts, or with an error.

    It exchanges one message: at its end, or at an error in it. A compiled region knows no values
    and sends errors alone.

    Args:
        name: the group's, from :func:`name_of`.
        like: as for :func:`errors_shared`.
        facts: what must be the same on all ranks.
    """
    if not name or torch.compiler.is_compiling():
        return errors_shared(name, like)
    return _meeting(name, like, facts)


def agree(
    name: str, facts: Sequence[Fact], like: object, own: Sequence[float] = ()
) -> list[list[float]]:
    """Raise, on every rank, if the options of the ranks' criteria or monitors differ.

    Returns:
        A list for each rank, of the numbers that it has sent as its ``own``; all send as many.
    """
    group = torch_private.process_group_named(name)
    rows = _exchange_facts(group, _CRITERION, own, facts, like)
    return [row[1 : 1 + len(own)] for row in rows]


def meet_peers(name: str, batch: int, facts: Sequence[Fact], like: object) -> Peers:
    """Return the ranks and their batch sizes. Raise, on every rank, if their facts differ.

    This is the first exchange of a forward pass.
    """
    group = torch_private.process_group_named(name)
    rows = _exchange_facts(group, _LOSSES, (batch,), facts, like)
    return Peers(group, dist.get_rank(group), tuple(int(row[1]) for row in rows))


def _exchange_facts(
    group: ProcessGroup, kind: int, own: Sequence[float], facts: Sequence[Fact], like: object
) -> list[list[float]]:
    """Return the messages of all ranks: the kind, numbers of the rank's own, and equal facts."""
    rows = _exchange(group, [kind, *own, *(fact.number() for fact in facts)], like)
    failed = [rank for rank, row in enumerate(rows) if row[0] == _ERROR]
    if failed:
        raise ValueError(
            f"group: ranks {failed} of it have raised an error; theirs says what was wrong"
        )
    if any(row[0] != kind for row in rows):
        raise ValueError(
            "group: expected the same calls in the same order on every rank; got a criterion's on "
            f"ranks {[r for r, row in enumerate(rows) if row[0] == _CRITERION]}, one of the "
            f"losses' on ranks {[r for r, row in enumerate(rows) if row[0] == _LOSSES]}"
        )
    for column, fact in enumerate(facts, 1 + len(own)):
        numbers = [row[column] for row in rows]
        if any(number != numbers[0] for number in numbers):
            texts = ", ".join(map(fact.text, numbers))
            raise ValueError(
                f"group: expected {fact.expected} on every rank; got {texts} by rank{fact.remedy}"
            )
    return rows


def _exchange(group: ProcessGroup, message: Sequence[float], like: object) -> list[list[float]]:
    """Return the messages of all ranks.

    The exchange is on the CPU if the group has a backend for it. If not, the host waits for the
    device.
    """
    assert len(message) <= WIDTH
    row = [*map(float, message), *[0.0] * (WIDTH - len(message))]
    with torch_private.without_transforms():
        sent = torch.tensor([row], dtype=torch.float64, device=_device(group, like))
        gathered = sent.new_empty(dist.get_world_size(group), WIDTH)
        _all_gather(gathered, sent, group)
        return gathered.tolist()


def _all_gather(
    gathered: Tensor, sent: Tensor, group: ProcessGroup, async_op: bool = False
) -> dist.Work | None:
    # The second name is that of PyTorch before 2.13, and deprecated since.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(gathered, sent, group=group, async_op=async_op)


def _device(group: ProcessGroup, like: object) -> torch.device:
    """Return a device that the group has a backend for.

    If that is a GPU, it is the one of the tensors in ``like``: the current one may be another
    rank's.
    """
    types = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if "cpu" in types:
        return torch.device("cpu")
    if (bound := getattr(group, "bound_device_id", None)) is not None:
        return bound
    return next(_devices(like, types[0]), torch.device(types[0]))


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


class Peers(NamedTuple):
    """The ranks of a group and the number of samples that each of them has."""

    group: ProcessGroup
    rank: int
    sizes: tuple[int, ...]

    @property
    def first(self) -> int:
        """The number of this rank's first sample among the samples of all ranks."""
        return sum(self.sizes[: self.rank])

    @property
    def share(self) -> float:
        """The factor on a mean over this rank's samples; 1 where all ranks have as many.

        With it, the plain average over the ranks is the mean over all samples.
        """
        return len(self.sizes) * self.sizes[self.rank] / sum(self.sizes)

    def start_gather(self, values: Tensor) -> Callable[[], Tensor]:
        """Send ``values`` (B, ...). Return a function that waits for all ranks' (G, ...)."""
        most = max(self.sizes)
        sent = values.contiguous()
        if len(values) < most:  # pieces have to be of one size
            sent = values.new_zeros(most, *values.shape[1:])
            sent[: len(values)] = values
        gathered = sent.new_empty(len(self.sizes) * most, *sent.shape[1:])
        work = _all_gather(gathered, sent, self.group, async_op=True)

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            if min(self.sizes) == most:
                return gathered
            pieces = zip(gathered.split(most), self.sizes, strict=True)
            return torch.cat([piece[:size] for piece, size in pieces])

        return finish

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest value of all ranks, element by element."""
        return _reduced(values, self.group, dist.ReduceOp.MAX)

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, element by element."""
        return _reduced(values, self.group, dist.ReduceOp.SUM)


def summed(values: Tensor, name: str) -> Tensor:
    """Return a copy that is summed over the ranks of the group with this name."""
    return _reduced(values, torch_private.process_group_named(name), dist.ReduceOp.SUM)


def _reduced(values: Tensor, group: ProcessGroup, op: dist.ReduceOp.RedOpType) -> Tensor:
    total = values.clone()
    dist.all_reduce(total, op, group=group)
    return total
