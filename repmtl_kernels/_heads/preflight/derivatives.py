"""Both derivatives of a result, to see which operation has none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from repmtl_kernels._heads.preflight.faults import Fault, fault_of, first_line
from repmtl_kernels._heads.preflight.graph import (
    Ends,
    Visited,
    ends_of,
    made_after,
    nodes_below,
    number_of,
)
from repmtl_kernels._training.saliencies import without_hooks

# Nodes that PyTorch puts where a derivative is missing: they raise in backward(), or only warn.
MISSING = (
    "torch::autograd::NotImplemented",
    "torch::autograd::Error",
    "torch::autograd::WarnNotImplemented",
)


class Derivatives:
    """First and second derivative of ``probe``. Remembers where each operation came from.

    own: the probe was made by this package, so an error in its first derivative is the head's
        fault. An error in a caller's loss may have other reasons, such as a graph that is freed.
    """

    def __init__(
        self, probe: Tensor, representations: Sequence[Tensor], ends: Ends, own: bool
    ) -> None:
        self.probe, self.representations, self.ends, self.own = probe, representations, ends, own
        self.forward = nodes_below([probe.grad_fn], ends)
        # From the nodes that the first derivative made to the node of the forward that made them.
        self.origin: dict[Node, Node] = {}
        self.running = get_gradient_edge(probe).node  # the last node whose backward started
        # Nodes whose gradient has no graph, and whether it is other than zero.
        self.constant: list[tuple[Node, bool]] = []

    def result(self) -> Fault | list[Tensor]:
        """Return a fault, or the saliencies at the representations that the probe depends on."""
        gradients, error = self._run(self.forward, [self.probe], observe=True)
        if error is not None:
            if not self.own and self._fails_without_a_graph():
                raise error
            return fault_of(self.running, f"failed: {first_line(error)}", error)
        saliencies = [s for s in gradients if s is not None]
        for node, nonzero in self.constant:
            if nonzero:
                return fault_of(
                    node,
                    "gives a gradient without a graph, so the second derivative leaves it out "
                    "without an error",
                )
            # A loss may be constant at this batch; a probe is not.
            if self.own and not any(s.any() for s in saliencies):
                return fault_of(node, "is zero everywhere: no saliency reaches z")
        leaves = self._leaves()
        second = nodes_below(
            [s.grad_fn for s in saliencies], ends_of([*self.representations, *leaves])
        )
        for node in second:
            if node.name() in MISSING:
                return fault_of(self.origin.get(node, node), "has no derivative")
        differentiable = [s for s in saliencies if s.requires_grad]
        _, error = self._run(second, differentiable, observe=False, leaves=leaves)
        if error is not None:
            node = self.origin.get(self.running, self.running)
            return fault_of(node, f"has no derivative: {first_line(error)}", error)
        return [s.detach() for s in saliencies]

    def _leaves(self) -> list[Tensor]:
        """Return the parameters of the head: the second derivative trains them too."""
        last = max(self.representations, key=number_of)
        nodes = dict.fromkeys(made_after(last, self.forward))
        return [
            node.variable for node in nodes if hasattr(node, "variable") and node not in self.ends
        ]

    def _fails_without_a_graph(self) -> bool:
        """Return whether the first derivative fails too, as where the graph is freed already."""
        try:
            with without_hooks(self.representations):
                grad(self.probe, self.representations, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 -- a Function may raise anything
            return not isinstance(error, CheckpointError)
        return False

    def _run(
        self,
        nodes: Visited,
        values: Sequence[Tensor],
        observe: bool,
        leaves: Sequence[Tensor] = (),
    ) -> tuple[Sequence[Tensor | None], Exception | None]:
        """Take the gradients of the values at representations and leaves, or return the error."""
        if not values:
            return [], None
        inputs = [*self.representations, *leaves]
        with contextlib.ExitStack() as hooks:  # left on, they would keep the graph alive
            for node in (node for node, leads in nodes.items() if leads):
                hooks.callback(node.register_prehook(functools.partial(self._start, node)).remove)
                if observe:
                    after = functools.partial(self._observe, node)
                    hooks.callback(node.register_hook(after).remove)
            try:
                with without_hooks(inputs):
                    gradients = grad(
                        values, inputs, [weights_of(v) for v in values], create_graph=observe,
                        retain_graph=True, allow_unused=True,
                    )  # fmt: skip
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 -- a Function may raise anything
                return [], error
        return gradients, None

    def _start(self, node: Node, incoming: tuple[Tensor | None, ...]) -> None:
        self.running = node

    def _observe(
        self,
        node: Node,
        gradients: tuple[Tensor | None, ...],
        incoming: tuple[Tensor | None, ...],
    ) -> None:
        """Look at the gradients that ``node`` returned, one for each of its inputs."""
        # All of several: a part without a graph may be that of a result that counts linearly.
        with_graph = all(g.requires_grad for g in incoming if g is not None)
        for gradient, (parent, _) in zip(gradients, node.next_functions, strict=True):
            if gradient is None:
                continue
            self._claim(gradient.grad_fn, node)
            on_path = parent is not None and (
                parent in self.ends or self.forward.get(parent, False)
            )
            if with_graph and on_path and not gradient.requires_grad:
                self.constant.append((node, bool(gradient.any())))

    def _claim(self, new: Node | None, origin: Node) -> None:
        """Note that ``origin`` made the node ``new``, and all nodes below it that are new too."""
        stack = [new]
        while stack:
            node = stack.pop()
            if node is None or node in self.ends or node in self.forward or node in self.origin:
                continue
            self.origin[node] = origin
            stack += [parent for parent, _ in node.next_functions]


def weights_of(value: Tensor) -> Tensor:
    """Return fixed weights for the elements, all different.

    Equal ones would cancel in a softmax, a norm or a difference.
    """
    generator = torch.Generator().manual_seed(250721049)  # not the user's: z may come from that
    return torch.randn(value.shape, generator=generator, device="cpu").to(value)
