"""Levels: a tuple of representations with names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from repmtl_kernels import Levels


def test_levels_are_a_tuple_with_names() -> None:
    tensors = {name: torch.randn(2, 3, n) for n, name in enumerate("abc", 1)}
    named, plain = Levels(tensors), Levels(*tensors.values())
    assert named.names == ("a", "b", "c") and plain.names == (0, 1, 2)
    assert list(named) == list(plain) == list(tensors.values()) and len(named) == 3
    assert named["b"] is named[1] is tensors["b"] and named[-1] is tensors["c"]
    assert dict(named.items()) == tensors
    first, *rest = named
    assert first is tensors["a"] and len(rest) == 2
    assert repr(named) == "Levels(a: (2, 3, 1), b: (2, 3, 2), c: (2, 3, 3))"
    assert "a" in named and "d" not in named and 0 not in named and tensors["b"] in plain
    assert dict(named) == tensors and named.values() == tuple(tensors.values())
    with pytest.raises(KeyError, match=r"'d'.*\['a', 'b', 'c'\]"):
        named["d"]
    for copied in (copy.copy(named), copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert copied.names == named.names
        torch.testing.assert_close(tuple(copied), tuple(named))


def test_levels_in_a_tree() -> None:
    layer = nn.Linear(3, 4)

    def both(x: Tensor) -> Levels:
        return Levels(first=layer(x), second=layer(x).sin())

    x = torch.randn(5, 3)
    levels = torch.vmap(both)(x)
    assert isinstance(levels, Levels) and levels.names == ("first", "second")
    torch.testing.assert_close(levels["second"], layer(x).sin())
    leaves, form = torch.utils._pytree.tree_flatten(levels)
    assert torch.utils._pytree.tree_unflatten([1, 2], form).names == levels.names
    assert [leaf.shape for leaf in leaves] == [(5, 4), (5, 4)]


def test_levels_as_leaves() -> None:
    """LibMTL's architectures make a representation a leaf in this way."""
    z = Levels(a=torch.randn(2, 3, requires_grad=True) * 1, b=torch.randn(2, 4))
    leaves = z.detach().clone()
    assert leaves.names == z.names and not leaves.requires_grad
    leaves.requires_grad = True
    assert leaves.requires_grad and leaves.requires_grad_() is leaves
    assert all(leaf.is_leaf for leaf in leaves)
    assert leaves["a"].data_ptr() != z["a"].data_ptr()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    (
        (lambda x: Levels(), ValueError, "levels: expected at least one Tensor, got none"),
        (lambda x: Levels([]), ValueError, "levels: expected at least one"),
        (lambda x: Levels({}), ValueError, "levels: expected at least one"),
        (lambda x: Levels(x, None), TypeError, r"levels\[1\]: expected a Tensor, got NoneType"),
        (lambda x: Levels(a=3.0), TypeError, r"levels\['a'\]: expected a Tensor, got float"),
        (lambda x: Levels("ab"), TypeError, "levels: expected Tensors, .* got str"),
        (lambda x: Levels(3), TypeError, "levels: expected Tensors, .* got int"),
        (lambda x: Levels(x, x), ValueError, r"levels\[1\]: expected another tensor"),
        (lambda x: Levels(x, b=x), TypeError, "levels: expected tensors in order or"),
        (lambda x: Levels({1: x}), TypeError, "levels: expected a dict with names .* key 1"),
        (lambda x: Levels([x], x), TypeError, r"levels\[0\]: expected a Tensor, got list"),
    ),
)
def test_bad_levels(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make(torch.randn(2, 3))
