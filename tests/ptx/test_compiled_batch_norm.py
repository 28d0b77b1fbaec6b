"""Batch norm's derivatives through compiled kernels, against autograd in float64."""

from __future__ import annotations

import pytest
from batch_norm_cases import Problem, check_both

from ptx.tier import CAPABILITIES, MARKS, MODES, compiled, diagonal

pytestmark = MARKS

# Rows of odd length and aligned ones, several tiles in a row, several blocks of channels.
PROBLEMS = {
    "odd rows": {"shape": (3, 5, 9, 7)},
    "aligned rows": {"shape": (3, 16, 8, 16)},
    "no positions": {"shape": (40, 37)},
    "one sample": {"shape": (1, 20, 4, 4)},
    "many positions": {"shape": (2, 3, 20, 31)},
    "many channels": {"shape": (2, 70)},
    "channels last": {"shape": (3, 16, 8, 8), "layout": "channels_last"},
    "transposed": {"shape": (3, 10, 4, 5), "layout": "transposed"},
    "crop": {"shape": (3, 10, 4, 5), "layout": "crop"},
    "expanded gradient": {"shape": (3, 10, 4, 5), "grad_layout": "expanded"},
    "without ReLU": {"shape": (3, 16, 8, 8), "relu": False},
    "without parameters": {"shape": (3, 16, 8, 8), "affine": False},
}


@pytest.mark.parametrize(
    ("capability", "training", "mode", "problem"),
    diagonal(
        (*CAPABILITIES, 100), (True, False), ("bfloat16", "ieee", "float16"), PROBLEMS, step=3
    ),
    ids=str,
)
def test_both_derivatives(capability: int, training: bool, mode: str, problem: str):
    dtype = MODES[mode].dtype
    with compiled(capability, mode) as launches:
        check_both(Problem(dtype=dtype, training=training, **PROBLEMS[problem]), dtype)
    assert launches.all
