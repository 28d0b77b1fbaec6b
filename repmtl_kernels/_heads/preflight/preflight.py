"""Which operation of a task head has no second derivative, in which module, and the remedy; and
heads whose saliencies have no means."""

from __future__ import annotations

import contextlib
import functools
import re
import types
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from repmtl_kernels._ground import torch_private
from repmtl_kernels._ground.checks import is_dtensor
from repmtl_kernels._ground.saliency import canonical_tasks, has_values
from repmtl_kernels._heads.buffers import BufferCopies
from repmtl_kernels._losses.arguments import check_saliencies
from repmtl_kernels._training.arguments import SHARED, Representation, Shared
from repmtl_kernels._training.levels import Levels, levels_of
from repmtl_kernels._training.saliencies import without_hooks
from repmtl_kernels._training.tasks import Task

Head = Callable[[Any], Any]
Heads = Head | Sequence[Head] | Mapping[Hashable, Head] | nn.ModuleList | nn.ModuleDict
# Where the graph of the heads ends: nodes, and those of their outputs that are representations.
Ends: TypeAlias = Mapping[Node, set[int]]


class SecondDerivativeError(RuntimeError):
    """A head can't be trained with Rep-MTL: its saliency has no derivative, or a wrong one.

    The message names the head or task, the module where it was found, the operation and what to do.
    """


class Place(NamedTuple):
    """Says where a node was in its graph, and outlives the graph."""

    operation: str
    number: int  # PyTorch's sequence number

    @classmethod
    def of(cls, node: Node) -> Place:
        return cls(_operation(node), torch_private.sequence_number(node))


class Fault(NamedTuple):
    what: str
    remedy: str
    place: Place | None = None  # in the graph of the head's forward
    cause: BaseException | None = None
    module: str | None = None


class NoMeans(NamedTuple):
    """Of the saliency of a head that can be trained; what a warning says of it."""

    axis: str
    made_of_them: str
    norm: str
    option: str

    def __str__(self) -> str:
        return (
            f"the saliency's means over the {self.axis} are zero but for rounding: "
            f"{self.made_of_them} would leave this task out, and be noise where all tasks are like "
            f"it. A head that begins with {self.norm} does that, or with anything else that takes "
            f"no notice of what its {self.axis} have in common. Put it into the encoder, and give "
            "the criterion what comes out of it as the representation; or set "
            f"{self.option}=0"
        )


OVER_CHANNELS = NoMeans("channels", "TSR", "a LayerNorm", "lambda_tsr")
OVER_POSITIONS = NoMeans("positions", "CSA's anchors", "an InstanceNorm", "lambda_csa")

# --- what is known about operations, by the name of their node ---

_SDPA = "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
_ATTENTION = ("FlashAttn", "FlashAttention", "EfficientAttention", "FlexAttention", "_fMHA")
_SHARDED = (
    "a module sharded with fully_shard frees its parameters, or reduces their gradients, before "
    "the second-order pass has come to them"
)
_SHARDED_1 = (
    "FullyShardedDataParallel (FSDP1) frees its parameters before the second-order pass has come "
    "to them"
)
_KEEP_WHOLE = (
    "Shard the encoder alone, with torch.distributed.fsdp.fully_shard, and keep the heads whole, "
    "e.g. in DistributedDataParallel; see docs/distributed.md"
)
_KNOWN = (
    (
        ("CompiledFunction",),
        "a torch.compile region has no second derivative",
        "Compile the encoder alone, or the whole step with torch.func.grad for all gradients",
    ),
    (
        ("ScaledDotProduct",),
        "fused attention has no second derivative",
        f"Call the head under {_SDPA}",
    ),
    (
        _ATTENTION,
        "fused attention has no second derivative",
        f"Use torch.nn.functional.scaled_dot_product_attention under {_SDPA}",
    ),
    (
        ("CudnnRnn", "MiopenRnn"),
        "a cuDNN RNN has no second derivative",
        "Call the head under torch.backends.cudnn.flags(enabled=False)",
    ),
    (
        ("CheckpointFunction",),
        "re-entrant checkpointing can't give saliencies",
        "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    ),
    (
        ("SyncBatchNorm",),
        "SyncBatchNorm has no second derivative",
        "Use BatchNorm or GroupNorm in the heads; the encoder may keep SyncBatchNorm",
    ),
    (("RegisterPostBackwardFunction",), _SHARDED, _KEEP_WHOLE),
)
_STATIC_FAULT = (
    "DistributedDataParallel(static_graph=True) reduces gradients after the first backward pass "
    "through it, and that is the saliency's, which has none yet: the replicas would drift apart "
    "without a word"
)
_NOT_STATIC = (
    "Leave static_graph out, call the criterion inside the wrapped module, or take one step "
    "without the regulariser first (start=1)"
)
# once_differentiable wraps a function; all its wrappers share one code object.
_ONCE = once_differentiable(print).__code__


def _operation(node: Node) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _known_fault(node: Node) -> Fault | None:
    operation = _operation(node)
    for prefixes, what, remedy in _KNOWN:
        if operation.startswith(prefixes):
            return Fault(f"{what} (operation {operation})", remedy, Place.of(node))
    if operation.startswith("_DDPSink") and torch_private.ddp_waits_for_static_graph(
        torch_private.wrapped_module(node)
    ):
        return Fault(_STATIC_FAULT, _NOT_STATIC, Place.of(node))
    if isinstance(node, BackwardCFunction):
        backward = torch_private.defined_function(node).backward
        if getattr(backward, "__code__", None) is _ONCE:
            return _custom_fault(node, "is marked with once_differentiable")
    return None


def _custom_fault(node: Node, why: str) -> Fault:
    return Fault(
        f"the backward of the autograd.Function {_operation(node)} {why}",
        "Write that backward with differentiable operations of PyTorch (no once_differentiable, "
        "detach, no_grad or own kernel), or use another operation",
        Place.of(node),
    )


def _fault_of(node: Node, why: str, cause: BaseException | None = None) -> Fault:
    """The fault that ``node`` was found to have."""
    if isinstance(cause, CheckpointError):  # of what checkpointing does, whatever the node
        return Fault(
            f"checkpointing did not get the same operations in the backward: {_first_line(cause)}",
            "Enter contexts, second_order() too, inside the checkpointed function, not around it; "
            "or use convert_second_order(head) in place of second_order()",
            Place.of(node),
            cause,
        )
    fault = _known_fault(node)
    if fault is None and isinstance(node, BackwardCFunction):
        fault = _custom_fault(node, why)
    if fault is None:
        fault = Fault(
            f"the backward of operation {_operation(node)} {why}",
            "Use operations that PyTorch can differentiate twice instead",
            Place.of(node),
        )
    return fault._replace(cause=cause)


# --- the graph between a result and the representations ---


def _ends_of(representations: Iterable[Tensor]) -> dict[Node, set[int]]:
    ends: dict[Node, set[int]] = {}
    for edge in map(get_gradient_edge, representations):
        ends.setdefault(edge.node, set()).add(edge.output_nr)
    return ends


def _leads(
    roots: Iterable[Node | None], ends: Ends, known: dict[Node, bool] | None = None
) -> dict[Node, bool]:
    """The nodes below ``roots`` that are not in ``known``, and whether they lead to an end.

    Nothing below an end is visited. Each node is visited once; ``known`` is filled.
    """
    known = {} if known is None else known
    before = len(known)
    stack = [(root, False) for root in roots if root is not None and root not in ends]
    while stack:
        node, parents_done = stack.pop()
        parents = [(parent, nr) for parent, nr in node.next_functions if parent is not None]
        if parents_done:
            known[node] = any(
                nr in ends[parent] if parent in ends else known[parent] for parent, nr in parents
            )
        elif node not in known:
            known[node] = False
            stack.append((node, True))
            stack += [(parent, False) for parent, _ in parents if parent not in ends]
    return dict(list(known.items())[before:])


def _depends(values: Iterable[Tensor], ends: Ends) -> bool:
    edges = [get_gradient_edge(v) for v in values if v.grad_fn is not None]
    if any(edge.output_nr in ends.get(edge.node, ()) for edge in edges):
        return True
    return any(_leads([edge.node for edge in edges], ends).values())


def made_from_another(tensors: Sequence[Tensor]) -> int | None:
    """The index of the first tensor whose graph leads to another one of them."""
    ends = _ends_of(tensors)
    known: dict[Node, bool] = {}  # one walk over the encoder's graph for all of them
    for i, z in enumerate(tensors):
        made_from = [] if z.grad_fn is None else z.grad_fn.next_functions
        parents = [(parent, nr) for parent, nr in made_from if parent is not None]
        _leads([parent for parent, _ in parents], ends, known)
        if any(nr in ends[p] if p in ends else known[p] for p, nr in parents):
            return i
    return None


def explain(new: Sequence[Task], tasks: Sequence[Task], applied: bool) -> bool:
    """Raises where a loss can't be trained with: on its first training call, with its own graph.

    Operations that are known to have no second derivative are looked for first, since some of them
    fail in ways that say nothing. Then the derivatives are taken, which shows all others.

    Args:
        new: the tasks to look at, with a graph between each loss and its representations.
        tasks: all tasks of the call.
        applied: whether this call has the regulariser.

    Returns:
        Whether that could be told; not yet where the first backward pass through a static graph is
        to be one without saliencies.
    """
    visited: dict[frozenset, dict[Node, bool]] = {}
    dependent: list[tuple[Task, Ends, str]] = []  # taking the saliencies refuses others
    for task in new:
        _refuse_shared(task, tasks)
        ends = _ends_of(task.representations)
        depends = _depends([task.loss], ends)
        key = frozenset((node, nr) for node, numbers in ends.items() for nr in numbers)
        known = visited.setdefault(key, {})
        nodes = _leads([task.loss.grad_fn], ends, known)
        between = " or ".join(name for name, _ in task.places)
        for name, z in task.places:
            fault = _sharded_fault(z, _made_after(z, nodes))
            if fault is not None:
                raise SecondDerivativeError(
                    f"losses[{task.key!r}]: {fault.what}, and it is between {name} and this loss, "
                    f"or gave {name}. {fault.remedy}"
                )
            if z.grad_fn is not None and z.grad_fn.name().startswith("_DDPSink"):
                if not depends:
                    raise SecondDerivativeError(
                        f"losses[{task.key!r}]: does not depend on {name}, a result of "
                        "DistributedDataParallel, which copies its results where static_graph or "
                        "find_unused_parameters is set. Call the criterion inside the wrapped "
                        "module"
                    )
        for node, leads in nodes.items():
            fault = _known_fault(node) if leads else None
            if fault is None:
                continue
            if fault.what == _STATIC_FAULT and not applied:
                return False
            raise SecondDerivativeError(_between(task, between, fault))
        if depends:
            dependent.append((task, ends, between))
    for task, ends, between in dependent:
        result = _Derivatives(task.loss, task.representations, ends, own=False).result()
        if isinstance(result, Fault):
            raise SecondDerivativeError(_between(task, between, result)) from result.cause
    return True


def _between(task: Task, names: str, fault: Fault) -> str:
    return (
        f"losses[{task.key!r}]: {fault.what}, and it is between {names} and this loss. "
        f"{fault.remedy}. RepMTL.check(heads, z) finds the module"
    )


def _refuse_shared(task: Task, tasks: Sequence[Task]) -> None:
    """Raises where a loss depends on a representation that is another task's alone."""
    if all(other.places is task.places for other in tasks):  # shared by all
        return
    own = _ends_of(task.representations)
    if not _depends([task.loss], own):
        return  # taking the saliencies says so
    blocked = {node: set() for node in own}
    for other in tasks:
        for name, z in other.places:
            edge = get_gradient_edge(z)
            if edge.output_nr in own.get(edge.node, ()):
                continue
            # Not through its own representation: what the encoder does is another matter.
            ends = {**blocked, edge.node: {edge.output_nr}}
            if _depends([task.loss], ends) and _has_gradient(task.loss, z):
                raise ValueError(
                    f"losses[{task.key!r}]: expected a loss that depends on {task.places[0][0]} "
                    f"alone, got one that depends on {name} too. {SHARED}"
                )


def _has_gradient(loss: Tensor, z: Tensor) -> bool:
    """Whether it is not zero: the elements of a stack of losses depend on all there is."""
    with without_hooks([z]):
        (found,) = grad(loss, z, retain_graph=True, allow_unused=True)
    return found is not None and bool((found != 0).any())


def _made_after(z: Tensor, nodes: Mapping[Node, bool]) -> list[Node]:
    """The nodes below a loss that its head made, and the leaves that these are given: not what an
    encoder made beside ``z``, e.g. for a skip connection."""
    first = _number_of(z)
    made = [n for n, leads in nodes.items() if leads or torch_private.sequence_number(n) > first]
    leaves = (parent for node in made for parent, _ in node.next_functions)
    own = [node for node in made if not hasattr(node, "variable")]
    return own + [leaf for leaf in leaves if hasattr(leaf, "variable")]


def _number_of(z: Tensor) -> int:
    """PyTorch's sequence number of the operation that made ``z``."""
    return -1 if z.grad_fn is None else torch_private.sequence_number(z.grad_fn)


def _sharded_fault(z: Tensor, nodes: Iterable[Node]) -> Fault | None:
    """Of parameters between a loss and ``z``, and of hooks on ``z``, which every saliency fires."""
    sharded: set[int] = set()
    for hook in torch_private.backward_hooks(z).values():
        function = getattr(hook, "func", hook)  # FSDP1's is a partial
        if getattr(function, "__module__", "") == "torch.distributed.fsdp._runtime_utils":
            return Fault(_SHARDED_1, _KEEP_WHOLE)
        sharded |= {id(p) for p in torch_private.unsharded_parameters(hook)}
    for node in nodes:
        leaf = getattr(node, "variable", None)
        if leaf is None:
            continue
        if torch_private.is_flat_parameter(leaf):
            return Fault(_SHARDED_1, _KEEP_WHOLE)
        if id(leaf) in sharded:
            return Fault(_SHARDED, _KEEP_WHOLE)
    return None


# --- the preflight ---


def check(heads: Heads, z: Representation, *, channel_dim: int = 1) -> None:
    """Finds heads that can't be trained with Rep-MTL, before a long run starts::

        RepMTL.check(heads, encoder(x))  # for tokens (B, N, D): channel_dim=-1

    Runs each head, one after the other, on a detached copy of its representation, takes a saliency
    and the derivative of it. Call it as the training step calls the heads: in the same mode, under
    the same autocast, attention and cuDNN contexts, on every rank. Parameters, their gradients,
    buffers (running statistics), modes, hooks and the random state of PyTorch are left as they are.

    It takes what was observed for a batch like ``z``; another path through a head may differ.

    Args:
        heads: a module or a function of the representation, or a list, tuple, ``ModuleList``, dict
            or ``ModuleDict`` of them. Its result holds tensors in lists, tuples, dicts and
            dataclasses. A loss may be part of it: ``lambda z: cross_entropy(head(z), labels)``.
        z: the shared representation, or :class:`Levels` of several, which each head is then given.
            In multi-input learning a list, tuple or dict with one per head. It needs no graph.
        channel_dim: of ``z``, as for the criterion.

    Warns:
        UserWarning: a saliency's means over the channels (what TSR sees of it) or over the
            positions (CSA's anchor) are zero but for rounding, as where a head begins with a
            LayerNorm or an InstanceNorm.

    Raises:
        SecondDerivativeError: a head has an operation without a second derivative (a compiled
            region, fused attention, a cuDNN RNN, re-entrant checkpointing, SyncBatchNorm, a sharded
            module, a custom ``autograd.Function``), with one that is wrong without a word (its
            backward detaches its result; tensors that it detaches on the way are not seen), does
            not depend on ``z``, or writes to it.
        ValueError, TypeError: an argument is not as described.
    """
    named = _named_heads(heads)
    representations = _representations(z, heads, len(named), channel_dim)
    for (name, head), representation in zip(named.items(), representations, strict=True):
        saliencies = _check_head(name, head, representation)
        for saliency in filter(has_values, saliencies):
            for found in without_means(saliency, channel_dim):
                warnings.warn(f"{name}: {found}", stacklevel=2)


def without_means(saliency: Tensor, channel_dim: int) -> Iterator[NoMeans]:
    """Which means of a saliency are nothing but rounding; waits for the device."""
    (s,) = canonical_tasks((saliency,), False, channel_dim)
    s = s.double().flatten(2) if s.ndim > 2 else s.double()[:, :, None]
    rounding = min(256 * torch.finfo(saliency.dtype).eps, 0.03)
    for axis, no_means in ((1, OVER_CHANNELS), (2, OVER_POSITIONS)):
        # Their size over that of the means of as many independent elements.
        size = s.mean(axis).norm() * s.shape[axis] / s.norm()
        if s.shape[axis] > 1 and size < rounding:
            yield no_means


def _check_head(name: str, head: Head, z: Shared) -> list[Tensor]:
    """A saliency of the head at each level that it depends on."""
    modules = _modules_of(head)
    for module, inner in modules.items():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            fault = Fault(_SHARDED_1, _KEEP_WHOLE)
        elif "FSDPModule" in kinds or any(map(is_dtensor, module._parameters.values())):
            fault = Fault(_SHARDED, _KEEP_WHOLE)
        elif "DistributedDataParallel" in kinds and torch_private.ddp_waits_for_static_graph(
            module
        ):
            fault = Fault(
                _STATIC_FAULT, f"{_NOT_STATIC}; to check the heads alone, pass what it wraps"
            )
        else:
            continue
        where = f"{name}, module {inner!r}" if inner else name
        raise SecondDerivativeError(f"{where}: {fault.what}. {fault.remedy}")
    with _left_as_found(modules, z):
        found = _fault_or_saliencies(head, z, None)
    if isinstance(found, list):
        return found
    # Again, and now modules are watched: hooks on them could change what a compiler does.
    calls = _Calls(modules)
    with _left_as_found(modules, z), calls.watched():
        again = _fault_or_saliencies(head, z, calls)
    fault = found if isinstance(again, list) else again
    if fault.module is None and fault.place is not None:
        fault = fault._replace(module=calls.module_of(fault.place))
    where = f"{name}, module {fault.module}" if fault.module else name
    raise SecondDerivativeError(f"{where}: {fault.what}. {fault.remedy}") from fault.cause


def _fault_or_saliencies(head: Head, z: Shared, calls: _Calls | None) -> Fault | list[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        # Not leaves, as in training: a head may then write to them, and that shows.
        given = [level.detach().clone().requires_grad_().clone() for level in levels_of(z)]
        ends = _ends_of(given)
        if calls is not None:
            calls.begin(given, ends)
        outputs = list(_tensors(head(z.like(given) if isinstance(z, Levels) else given[0])))
        if _version(given):
            return Fault(
                "the representation is written in place",
                "Use the out-of-place form, e.g. ReLU(inplace=False), on the representation",
                module=calls and calls.writes,
            )
        outputs = [torch.view_as_real(o) if o.is_complex() else o for o in outputs]
        outputs = [o for o in outputs if o.requires_grad]
        if not _depends(outputs, ends):
            return Fault(
                "the result does not depend on the representation: it is not used, or the graph "
                "is cut (.detach(), .data, torch.no_grad(), argmax, .numpy())",
                "Keep the graph from the representation to the result",
                module=calls and calls.cuts,
            )
        # A square around each value: never saturated, so no gradient is lost to it.
        squares = [(_weights(o) * (o - o.detach() + 1) ** 2).sum() for o in outputs]
        probe = sum(square.to(given[0].device) for square in squares)
        return _Derivatives(probe, given, ends, own=True).result()


def _version(tensors: Iterable[Tensor]) -> int:
    return sum(t._version for t in tensors)


# Nodes that PyTorch puts where a derivative is missing: they raise in backward(), or only warn.
MISSING = (
    "torch::autograd::NotImplemented",
    "torch::autograd::Error",
    "torch::autograd::WarnNotImplemented",
)


class _Derivatives:
    """First and second derivative of ``probe``; remembers where each operation came from.

    own: the probe was made here, so an error in its first derivative is the head's fault. That of
    a caller's loss may have other reasons, such as a graph that is freed already.
    """

    def __init__(self, probe: Tensor, given: Sequence[Tensor], ends: Ends, own: bool) -> None:
        self.probe, self.given, self.ends, self.own = probe, given, ends, own
        self.forward = _leads([probe.grad_fn], ends)
        self.origin: dict[Node, Node] = {}  # of the nodes that the first derivative made
        self.started: Node | None = None
        self.constant: list[tuple[Node, bool]] = []  # nodes that lose the graph; if not by zeros

    def result(self) -> Fault | list[Tensor]:
        """A fault, or the saliencies at the representations that the probe depends on."""
        found, error = self._run(self.forward, [self.probe], observe=True)
        if error is not None:
            if not self.own and self._fails_without_a_graph():
                raise error
            return _fault_of(self.started, f"failed: {_first_line(error)}", error)
        saliencies = [s for s in found if s is not None]
        for node, nonzero in self.constant:
            # A loss may be constant at this batch; a probe is not.
            if nonzero or (self.own and not any(s.any() for s in saliencies)):
                return _fault_of(
                    node,
                    "gives a gradient without a graph, so the second derivative leaves it out "
                    "without a word" if nonzero else "is zero everywhere: no saliency reaches z",
                )  # fmt: skip
        leaves = self._leaves()
        second = _leads([s.grad_fn for s in saliencies], _ends_of([*self.given, *leaves]))
        for node in second:
            if node.name() in MISSING:
                return _fault_of(self.origin.get(node, node), "has no derivative")
        differentiable = [s for s in saliencies if s.requires_grad]
        _, error = self._run(second, differentiable, observe=False, leaves=leaves)
        if error is not None:
            node = self.origin.get(self.started, self.started)
            return _fault_of(node, f"has no derivative: {_first_line(error)}", error)
        return [s.detach() for s in saliencies]

    def _leaves(self) -> list[Tensor]:
        """The parameters of the head: the second derivative trains them too."""
        last = max(self.given, key=_number_of)
        nodes = (node for node in _made_after(last, self.forward) if hasattr(node, "variable"))
        return [node.variable for node in dict.fromkeys(nodes) if node not in self.ends]

    def _fails_without_a_graph(self) -> bool:
        """Whether there is no first derivative either, as where the graph is freed already."""
        try:
            with without_hooks(self.given):
                grad(self.probe, self.given, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 -- a Function may raise anything
            return not isinstance(error, CheckpointError)
        return False

    def _run(
        self,
        nodes: dict[Node, bool],
        values: Sequence[Tensor],
        observe: bool,
        leaves: Sequence[Tensor] = (),
    ) -> tuple[Sequence[Tensor | None], Exception | None]:
        if not values:
            return [], None
        inputs = [*self.given, *leaves]
        with contextlib.ExitStack() as hooks:  # left on, they would keep the graph alive
            for node in (node for node, leads in nodes.items() if leads):
                hooks.callback(node.register_prehook(functools.partial(self._start, node)).remove)
                if observe:
                    after = functools.partial(self._observe, node)
                    hooks.callback(node.register_hook(after).remove)
            try:
                with without_hooks(inputs):
                    found = grad(
                        values, inputs, [_weights(v) for v in values], create_graph=observe,
                        retain_graph=True, allow_unused=True,
                    )  # fmt: skip
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 -- a Function may raise anything
                return [], error
        return found, None

    def _start(self, node: Node, grads: tuple) -> None:
        self.started = node

    def _observe(self, node: Node, grads: tuple, incoming: tuple) -> None:
        """After ``node`` gave ``grads``, one for each of its inputs."""
        # All of several: a part without a graph may be that of a result that counts linearly.
        with_graph = all(g.requires_grad for g in incoming if g is not None)
        for given, (parent, _) in zip(grads, node.next_functions, strict=True):
            if given is None:
                continue
            self._claim(given.grad_fn, node)
            on_path = parent in self.ends or self.forward.get(parent, False)
            if with_graph and on_path and not given.requires_grad:
                self.constant.append((node, bool(given.any())))

    def _claim(self, new: Node | None, origin: Node) -> None:
        stack = [new]
        while stack:
            node = stack.pop()
            if node is None or node in self.ends:
                continue
            if node in self.forward or node in self.origin:
                continue
            self.origin[node] = origin
            stack += [parent for parent, _ in node.next_functions]


# --- modules ---


class _Calls:
    """Which module was running when: by PyTorch's sequence number of graph nodes."""

    def __init__(self, modules: dict[nn.Module, str]) -> None:
        self.modules = modules
        self.writes: str | None = None  # the innermost module that wrote to the representation
        self.cuts: str | None = None  # the innermost module whose result lost the representation

    def begin(self, given: list[Tensor], ends: Ends) -> None:
        self.given, self.ends = given, ends
        self.running: list[tuple[int, int, bool]] = []
        self.spans: list[tuple[int, int, str]] = []
        self.writes = self.cuts = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for module in self.modules:
                # Hooks would become part of what is compiled; scripted modules take none.
                if not _is_compiled(module) and not isinstance(module, torch.jit.ScriptModule):
                    for handle in (
                        module.register_forward_pre_hook(self._enter),
                        module.register_forward_hook(self._leave, with_kwargs=True),
                    ):
                        hooks.callback(handle.remove)
            yield

    def _enter(self, module: nn.Module, args: tuple) -> None:
        number = torch_private.next_sequence_number()
        self.running.append((number, _version(self.given), torch.is_grad_enabled()))

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        number, version, enabled = self.running.pop()
        label = self.label(module)
        # Children leave before their parents: the first one is the innermost.
        self.spans.append((number, torch_private.next_sequence_number(), label))
        if self.writes is None and _version(self.given) != version:
            self.writes = label
        # What runs under no_grad is not at fault, but what switched it on.
        if self.cuts is None and enabled:
            took = _depends(_tensors((args, kwargs)), self.ends)
            if took and not _depends(_tensors(result), self.ends):
                self.cuts = label

    def module_of(self, place: Place) -> str | None:
        if place.operation.startswith("CompiledFunction"):
            compiled = [self.label(m) for m in self.modules if _is_compiled(m)]
            if compiled:
                return ", ".join(compiled)
        return next((label for a, b, label in self.spans if a <= place.number < b), None)

    def label(self, module: nn.Module) -> str:
        kind = type(getattr(module, "_orig_mod", module)).__name__
        name = self.modules[module]
        return f"{name!r} ({kind})" if name else kind


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _modules_of(head: Head) -> dict[nn.Module, str]:
    """The modules that a head runs, by their names; compiled ones as a whole."""
    found: dict[nn.Module, str] = {}

    def add(module: nn.Module, name: str) -> None:
        if module in found:
            return
        found[module] = name
        if not _is_compiled(module):
            for child, value in module.named_children():
                add(value, f"{name}.{child}" if name else child)

    for name, module in _roots(head, ""):
        add(module, name)
    return found


def _roots(value: Any, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a module, method, partial or function with a closure refers to."""
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, types.MethodType):
        yield from _roots(value.__self__, "")
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _roots(part, "")
    elif isinstance(value, types.FunctionType):
        code = value.__code__
        names = {n: value.__globals__[n] for n in code.co_names if n in value.__globals__}
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        for variable, cell in cells:
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                names[variable] = cell.cell_contents
        for variable, item in names.items():
            if isinstance(item, Mapping):
                parts = {f"{variable}[{key!r}]": part for key, part in item.items()}
            elif isinstance(item, list | tuple):
                parts = {f"{variable}[{i}]": part for i, part in enumerate(item)}
            else:
                parts = {variable: item}
            yield from ((n, part) for n, part in parts.items() if isinstance(part, nn.Module))


@contextlib.contextmanager
def _left_as_found(modules: Iterable[nn.Module], z: Shared) -> Iterator[None]:
    """Heads run on copies of their buffers, and the random state is put back."""
    inside = {inner for module in modules for inner in module.modules()}
    tensors = [*levels_of(z), *(p for m in inside for p in m._parameters.values() if p is not None)]
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    modes = {module: module.training for module in inside}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {d.type for d in devices}:
            stack.enter_context(
                torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind)
            )
        for module, training in modes.items():
            stack.callback(setattr, module, "training", training)
        stack.enter_context(BufferCopies(inside))
        yield


# --- arguments and results ---


def _named_heads(heads: Heads) -> dict[str, Head]:
    if isinstance(heads, Mapping | nn.ModuleDict):
        named = {f"heads[{key!r}]": head for key, head in heads.items()}
    elif isinstance(heads, list | tuple | nn.ModuleList):
        named = {f"heads[{i}]": head for i, head in enumerate(heads)}
    else:
        named = {"heads": heads}
    if not named:
        raise ValueError(f"heads: expected at least one, got an empty {type(heads).__name__}")
    for name, head in named.items():
        if not callable(head):
            swapped = ". Are they swapped? The heads come first" if isinstance(head, Tensor) else ""
            raise TypeError(
                f"{name}: expected a module or a function of the representation, got "
                f"{type(head).__name__}{swapped}"
            )
    return named


def _representations(z: Representation, heads: Heads, count: int, channel_dim: int) -> list[Shared]:
    """One for each head, in their order."""
    if isinstance(z, Tensor | Levels):
        values = {"z": z}
    elif isinstance(z, Mapping) and isinstance(heads, Mapping | nn.ModuleDict):
        if set(z) != set(heads):
            raise ValueError(f"z: expected the keys of heads, {list(heads)}; got {list(z)}")
        values = {f"z[{key!r}]": z[key] for key in heads}
    elif isinstance(z, list | tuple) and isinstance(heads, list | tuple | nn.ModuleList):
        if len(z) != count:
            raise ValueError(f"z: expected {count}, one for each head; got {len(z)}. {SHARED}")
        values = {f"z[{i}]": value for i, value in enumerate(z)}
    else:
        raise TypeError(
            f"z: expected a Tensor, or one for each head in a container like heads "
            f"({type(heads).__name__}), or Levels; got {type(z).__name__}"
        )
    for name, value in values.items():
        levels = value.items() if isinstance(value, Levels) else [(None, value)]
        for level, tensor in levels:
            name_of_z = name if level is None else f"{name}[{level!r}]"
            if isinstance(tensor, Tensor) and not tensor.is_floating_point():
                raise TypeError(
                    f"{name_of_z}: expected a floating-point Tensor, got {tensor.dtype}"
                )
            check_saliencies([tensor], channel_dim, name_of_z, [name_of_z])
    return list(values.values()) * (count if isinstance(z, Tensor | Levels) else 1)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a nested result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])


def _weights(value: Tensor) -> Tensor:
    """Fixed and all different: equal ones would cancel in a softmax, a norm, a difference."""
    generator = torch.Generator().manual_seed(250721049)  # no user's: z may be from such a one
    return torch.randn(value.shape, generator=generator, device="cpu").to(value)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
