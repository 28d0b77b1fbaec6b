"""The counts of a step: launches, allocations, compilations."""

from __future__ import annotations

import torch

from ptx.count_step import count, count_steps, step
from ptx.driver import driver
from ptx.tier import MARKS

pytestmark = MARKS


def test_operators_that_launch_and_those_that_allocate():
    def call():
        x = torch.empty(4)
        (x + 1).view(2, 2).mul_(2)
        return torch.zeros(3).expand(2, 3).t()

    with driver(90, execute=False) as launches:
        counts = count(call, launches)
    assert counts.operators == {"add": 1, "mul_": 1, "zeros": 1}
    assert counts.allocations == 3 and counts.launches == 3
    assert not counts.kernels and not counts.compiled


def test_a_step_launches_again_what_it_compiled():
    shape = (2, 4, 40, 4, 5)
    first, again = count_steps([shape, shape], torch.bfloat16, 90)
    assert first.kernels["_gradient_kernel"] == 1 and first.operators
    assert first.compiled == first.kernels and not again.compiled
    assert again._replace(compiled=first.compiled) == first


def test_a_step_of_another_kind_compiles_anew():
    with driver(90, execute=False) as launches:
        count(step((2, 4, 40, 4, 5), torch.bfloat16), launches)
        other = count(step((2, 4, 40, 4, 5), torch.float16), launches)
    assert other.compiled["_gram_kernel"] == 1
