"""Under an interpreter a test runs in enough cases that every two values of parameters meet."""

from dataclasses import dataclass
from itertools import combinations, product

import pairs
import pytest

AXES = {"dtype": (16, 32), "case": (*"abcdefg",), "loss": (*"xyz",)}


@dataclass(frozen=True, eq=False)
class Item:
    """Stands in for pytest's."""

    nodeid: str
    params: dict

    @property
    def callspec(self):
        return self


def cases(name: str, backend: str, axes: dict) -> list[Item]:
    values = [dict(zip(axes, row, strict=True)) for row in product(*axes.values())]
    return [Item(f"{name}[{row}]", {"backend": backend, **row}) for row in values]


def met(items) -> set:
    return {pair for item in items for pair in combinations(item.params.items(), 2)}


@pytest.mark.parametrize("left_out", [(), ((32, "c"), (16, "b"))], ids=["product", "part of it"])
def test_every_two_values_that_meet_in_a_case_meet_in_one_that_is_kept(left_out):
    slow = cases("test_a", "triton", AXES)
    slow = [i for i in slow if (i.params["dtype"], i.params["case"]) not in left_out]
    kept = pairs.chosen(slow, "triton")
    assert met(kept) == met(slow)
    assert len(kept) <= 7 * 3 + 3 < len(slow)  # no fewer than the two longest axes


def test_the_cases_of_each_test_and_those_of_other_backends_are_kept():
    slow = [*cases("test_a", "triton", AXES), *cases("test_b", "triton", AXES)]
    fast = cases("test_a", "eager", AXES)
    few = cases("test_c", "triton", {"case": AXES["case"], "loss": AXES["loss"]})
    kept = pairs.chosen([*slow, *fast, *few], "triton")
    assert {*fast, *few} <= kept
    for name in ("test_a", "test_b"):
        own = [i for i in slow if i.nodeid.startswith(name)]
        assert met(kept & {*own}) == met(own) and not {*own} <= kept
