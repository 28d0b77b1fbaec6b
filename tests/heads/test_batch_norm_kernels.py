"""Batch norm's first and second backward as Triton kernels, against autograd of the formula."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE

from benchmarks.rotation import Rotating, graphed
from repmtl_kernels.backends.availability import triton_status

if triton_status() != "ok":
    pytest.skip(f"needs Triton: {triton_status()}", allow_module_level=True)

from batch_norm_cases import Problem, check_both, check_first, check_second

from repmtl_kernels._heads.second_order.triton import walk

DTYPES = [torch.bfloat16, torch.float16]
SUBSETS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_every_choice_of_vectors_and_needs(training):
    for i, present in enumerate(SUBSETS):
        problem = Problem(
            (3, 4, 2, 3), training=training, affine=i % 3 > 0, relu=i % 2 > 0, present=present
        )
        for needs in SUBSETS:
            check_second(problem, needs=needs)
    for affine, relu in itertools.product([False, True], repeat=2):
        problem = Problem((3, 4, 2, 3), training=training, affine=affine, relu=relu)
        for needs in SUBSETS[:: 1 if affine else 3]:
            check_first(problem, needs=needs)


SHAPES = [
    (5, 7),  # no positions
    (2, 70),  # several blocks of channels, two values each
    (130, 3),  # several steps of rows
    (2, 1, 1),  # the fewest values that have statistics
    (7, 1),
    (3, 1, 5, 5),  # one channel
    (4, 33, 1, 1),
    (1, 20, 4, 4),  # one sample
    (3, 5, 7, 9),  # rows of odd length
    (2, 3, 20, 31),  # several tiles in a row
    (3, 16, 8, 16),  # aligned rows
    (2, 6, 40),
    (2, 6, 2, 3, 5),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    check_both(Problem(shape))
    check_both(Problem(shape, training=False, relu=False))


@pytest.mark.decisive
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((40, 37), "contiguous"), ((3, 5, 9, 7), "contiguous"), ((3, 16, 8, 8), "channels_last")],
    ids=str,
)
def test_dtypes(shape, layout, dtype, training):
    check_both(Problem(shape, dtype, layout, training=training), dtype)


@pytest.mark.parametrize("grad_layout", ["contiguous", "expanded", "negative_view"])
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "transposed", "crop", "negative_view"]
)
def test_layouts(layout, grad_layout):
    problem = Problem((3, 10, 4, 5), torch.float32, layout, grad_layout)
    check_both(problem)
    if layout != "crop":
        for result in (problem.first()[0], *problem.second()[:2]):
            assert result.stride() == problem.x.stride()


@pytest.mark.parametrize(
    ("order", "back"),
    [((1, 0, 2, 3), (1, 0, 2, 3)), ((2, 1, 0, 3), (2, 1, 0, 3)), ((2, 0, 1, 3), (1, 2, 0, 3))],
)
def test_memory_of_any_order(order, back):
    """Channels outermost, or in the middle of the positions."""
    problem = Problem((3, 10, 4, 5))
    problem.x = problem.x.permute(order).contiguous().permute(back)
    assert problem.x.shape == (3, 10, 4, 5) and not problem.x.is_contiguous()
    check_both(problem)
    assert problem.first()[0].stride() == problem.x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("constant", "value"), [("PROGRAMS", 1), ("FINISH_PARTS", 2)])
def test_large_sizes(constant, value, layout, monkeypatch):
    """Many tiles for each program; more partial sums than are added at once."""
    monkeypatch.setattr(walk, constant, value)
    walk.walk_of.cache_clear()
    check_both(Problem((4, 3, 20, 31), layout=layout))
    walk.walk_of.cache_clear()


def test_parameters_of_another_kind():
    """Parameters of float32 with a bfloat16 input; gradients of parameters may be expanded."""
    problem = Problem((3, 5, 4, 4), torch.bfloat16)
    problem.weight = problem.weight.float()
    problem.grad_grads[1:] = [torch.full((), v, device=DEVICE).expand(5) for v in (0.3, -0.7)]
    check_both(problem, torch.bfloat16)


def test_a_large_mean_is_taken_out_first():
    problem = Problem((4, 3, 8, 8), training=False, relu=False)
    problem.x = problem.x + 1000
    problem.mean = problem.mean + 1000
    check_both(problem)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_is_written_and_results_repeat(layout):
    problem = Problem((3, 10, 5, 7), layout=layout)
    tensors = [v for v in (*problem.operands, *problem.grad_grads) if torch.is_tensor(v)]
    before = [t.clone() for t in tensors]
    results = [*problem.first(), *problem.second()]
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    for _ in range(2):
        again = [*problem.first(), *problem.second()]
        assert all(torch.equal(a, r) for a, r in zip(again, results, strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_nan_stays_in_its_channel_and_shows(training):
    problem = Problem((3, 4, 2, 3), training=training)
    problem.output = None
    problem.grad[1, 2, 0, 1] = float("nan")
    for result in (*problem.first(), *problem.second()[1:]):
        channels = result.isnan() if result.dim() == 1 else result.isnan().any(-1).any(-1).any(0)
        assert channels.tolist() == [False, False, True, False]


def test_relu_passes_gradients_at_nan():
    """As torch.relu does: NaN in the output does not hide the gradient."""
    problem = Problem((3, 4, 2, 3), training=False)
    problem.output = torch.full_like(problem.x, float("nan"))
    actual = problem.first()
    problem.output = None
    assert all(torch.equal(f, e) for f, e in zip(actual, problem.first(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_captured_in_a_cuda_graph_without_synchronisation(layout):
    problem = Problem((4, 64, 12, 12), torch.bfloat16, layout)

    def both(_):
        return [*problem.first(), *problem.second()]

    expected = both(None)  # compiles
    actual = graphed(Rotating(both, [None]), torch.device("cuda"))()
    assert all(torch.equal(f, e) for f, e in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.slow_cpu
@pytest.mark.timeout(600)
def test_compiled_without_spills_and_with_wide_loads():
    """For each GPU generation; in a process of its own, since this one may interpret."""
    command = [sys.executable, "-m", "benchmarks.static_report", "--json", "--shape", "nyuv2"]
    command += ["--kernels", "batch_norm", "--mode", "bfloat16", "ieee"]
    command += ["--capability", "80", "90", "100", "--layout", "contiguous", "channels_last"]
    command += ["--disassemble", "_batch_norm_sums_kernel", "_batch_norm_apply_kernel"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert {row["capability"] for row in rows} == {80, 90, 100}
    assert not [row for row in rows if row["spill_bytes"]]
    streaming = [row for row in rows if row["kernel"].endswith(("sums_kernel", "apply_kernel"))]
    assert {(row["layout"], row["mode"]) for row in streaming} == set(
        itertools.product(("contiguous", "channels_last"), ("bfloat16", "ieee"))
    )
    for row in streaming:
        # 32 bits: one coefficient of a row's channel.
        assert set(row["global_loads"]) <= {"128", "32"} and row["global_loads"]["128"] > 0, row
        assert row["layout"] == "contiguous" or set(row["global_loads"]) == {"128"}, row
        assert row["registers"] <= 128
