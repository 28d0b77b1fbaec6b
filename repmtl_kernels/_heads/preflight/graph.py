"""Walks through the autograd graph between a result and the representations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from repmtl_kernels._ground import torch_private

# Where a walk ends: the nodes of the representations, and which outputs of the node these are.
Ends: TypeAlias = Mapping[Node, set[int]]
# Nodes that a walk has visited, and whether each one leads to an end.
Visited: TypeAlias = dict[Node, bool]


def ends_of(representations: Iterable[Tensor]) -> dict[Node, set[int]]:
    """Return the ends of a walk to these representations."""
    ends: dict[Node, set[int]] = {}
    for edge in map(get_gradient_edge, representations):
        ends.setdefault(edge.node, set()).add(edge.output_nr)
    return ends


def nodes_below(
    roots: Iterable[Node | None], ends: Ends, visited: Visited | None = None
) -> Visited:
    """Visit each node below ``roots`` once, and none below an end.

    Returns:
        The nodes that were not in ``visited``, which they are added to; and whether each one leads
        to an end.
    """
    visited = {} if visited is None else visited
    before = len(visited)
    stack = [(root, False) for root in roots if root is not None and root not in ends]
    while stack:
        node, parents_done = stack.pop()
        edges = _edges(node)
        if parents_done:
            visited[node] = _any_leads(edges, ends, visited)
        elif node not in visited:
            visited[node] = False
            stack.append((node, True))
            stack += [(parent, False) for parent, _ in edges if parent not in ends]
    return dict(list(visited.items())[before:])


def _edges(node: Node | None) -> list[tuple[Node, int]]:
    edges = () if node is None else node.next_functions
    return [(parent, number) for parent, number in edges if parent is not None]


def _any_leads(edges: Iterable[tuple[Node, int]], ends: Ends, visited: Visited) -> bool:
    return any(number in ends[n] if n in ends else visited[n] for n, number in edges)


def depends(values: Iterable[Tensor], ends: Ends) -> bool:
    """Return whether the graph of one of the values leads to an end."""
    edges = [get_gradient_edge(v) for v in values if v.grad_fn is not None]
    if any(edge.output_nr in ends.get(edge.node, ()) for edge in edges):
        return True
    return any(nodes_below([edge.node for edge in edges], ends).values())


def made_from_another(tensors: Sequence[Tensor]) -> int | None:
    """Return the index of the first tensor whose graph leads to another one of the tensors."""
    ends = ends_of(tensors)
    visited: Visited = {}  # one walk through the encoder's graph for all of them
    for i, z in enumerate(tensors):
        edges = _edges(z.grad_fn)
        nodes_below([parent for parent, _ in edges], ends, visited)
        if _any_leads(edges, ends, visited):
            return i
    return None


def made_after(z: Tensor, nodes: Visited) -> list[Node]:
    """Return the nodes below a loss that its head made, and the leaves that lead into these.

    Nodes that an encoder made beside ``z``, e.g. for a skip connection, are left out.
    """
    first = number_of(z)
    made = [n for n, leads in nodes.items() if leads or torch_private.sequence_number(n) > first]
    parents = [parent for node in made for parent, _ in _edges(node)]
    own = [node for node in made if not hasattr(node, "variable")]
    return own + [parent for parent in parents if hasattr(parent, "variable")]


def number_of(z: Tensor) -> int:
    """Return PyTorch's sequence number of the operation that made ``z``; -1 for a leaf."""
    return -1 if z.grad_fn is None else torch_private.sequence_number(z.grad_fn)
