"""The memory of the backward pass: Gram matrices saved or made again, checkpointed heads."""

import copy
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import (
    BACKEND_DTYPES,
    BACKENDS,
    DEVICE,
    LOSSES,
    Case,
    Loss,
    judge,
    settled,
    value_and_grads,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_extra_bytes
from benchmarks.parts import kept
from benchmarks.shapes import SHAPES, Shape
from repmtl_kernels import (
    RepMTL,
    checkpoint_contexts,
    convert_second_order,
    csa_loss,
    reference,
    rep_mtl_loss,
)
from repmtl_kernels._losses import backward
from repmtl_kernels.backends import choice

CASES = [
    Case(3, 3, 8, (5, 6)),
    Case(2, 3, 40, (4, 5), "mixed"),
    Case(2, 2, 96, (7, 7)),
    Case(9, 2, 10, (2, 2), "channels_last"),
    Case(1, 3, 20, (3, 3)),
    Case(3, 3, 24, (4, 5), "stacked"),
]
# The interpreter is slow, and the stages are those of the other tests.
OF_TRITON = {torch.float32: [CASES[1], CASES[4]], torch.bfloat16: [CASES[0], CASES[2]]}
RUNS = [
    (backend, dtype, case)
    for backend, dtype in BACKEND_DTYPES
    for case in (OF_TRITON.get(dtype, []) if (backend, DEVICE) == ("triton", "cpu") else CASES)
]


def _total(saliencies, **options):
    return rep_mtl_loss(saliencies, lambda_tsr=0.7, lambda_csa=1.3, **options).total


@pytest.fixture
def one_sample_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backward, "RECOMPUTE_BLOCK", 1)


@pytest.mark.parametrize(("backend", "dtype", "case"), RUNS, ids=str)
def test_recomputing_changes_no_bit(
    backend: str, dtype: torch.dtype, case: Case, monkeypatch: pytest.MonkeyPatch
):
    if hasattr(stages := choice.load(backend), "in_one_call"):
        # Where there is one call for all stages it rounds otherwise than they do.
        monkeypatch.setattr(stages, "in_one_call", lambda saliency: None)
    run = partial(value_and_grads, _total, case, case.make(dtype), backend=backend)
    value, grads = run(memory="save")
    for memory in ("recompute", "auto"):
        again, actual = run(memory=memory)
        assert torch.equal(again, value)
        assert all(torch.equal(f, g) for f, g in zip(actual, grads, strict=True))


LITERAL = Loss("total", partial(_total, memory="recompute"), LOSSES[2].literal)


@pytest.mark.usefixtures("one_sample_at_a_time")
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize(("backend", "dtype", "case"), RUNS, ids=str)
def test_one_sample_at_a_time(backend: str, dtype: torch.dtype, case: Case, eps: float):
    if (backend, DEVICE) == ("triton", "cpu") and eps:
        pytest.skip("the interpreter is slow")
    judge(LITERAL, case, dtype, backend, eps=eps)


def test_samples_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """As many as a block holds, the last part smaller; all tasks of them."""
    monkeypatch.setattr(backward, "RECOMPUTE_BLOCK", 2 * 3 * 20**2 + 5)
    assert backward.samples_at_a_time((5, 24, 4, 5), 3) == 2
    assert backward.samples_at_a_time((5, 20, 24), 3) == 2
    assert backward.samples_at_a_time((5, 40, 40), 3) == 1  # those of one are more
    stages, sizes = choice.load("eager"), []
    gram = stages.gram

    def spy(saliencies, *args, with_grad, **options):
        if with_grad:
            sizes.append([len(s) for s in saliencies])
        return gram(saliencies, *args, with_grad=with_grad, **options)

    monkeypatch.setattr(stages, "gram", spy)
    tensors = Case(3, 5, 24, (4, 5)).make(torch.float32)
    csa_loss(tensors, memory="recompute", backend="eager").backward()
    assert sizes == [[2] * 3, [2] * 3, [1] * 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_that_are_kept_are_those_of_the_formulas(backend: str):
    shape = Shape("", 3, 4, 24, 4, 5, 4, "")
    tensors = Case(3, 4, 24, (4, 5)).make(torch.float32)
    loss = partial(csa_loss, tensors, backend=backend)
    actual = {m: kept.kept_bytes(partial(loss, memory=m), tensors) for m in ("save", "recompute")}
    assert actual["recompute"] == kept.rest(shape)
    assert actual["save"] - kept.rest(shape) == kept.matrices(shape) + kept.projections(shape)


@pytest.mark.skipif(
    DEVICE != "cpu" or "REPMTL_EMULATED_CUDA" in os.environ,
    reason="counts what PyTorch allocates on the CPU, without the workspaces of operators for CUDA",
)
@pytest.mark.usefixtures("one_sample_at_a_time")
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("case", [Case(3, 6, 160, (12, 13)), Case(3, 6, 150, (14, 14))], ids=str)
def test_peak_of_forward_and_backward(backend: str, case: Case):
    tensors = case.make(torch.float32)
    rows = min(case.channels, case.spatial[0] * case.spatial[1])
    matrices = 4 * case.tasks * case.batch * rows**2
    peaks = {}
    for memory in ("save", "recompute"):

        def call(memory=memory):
            torch.autograd.grad(csa_loss(tensors, backend=backend, memory=memory), tensors)

        call()
        peaks[memory] = peak_extra_bytes(call, torch.device("cpu"))
    # All but the matrices of one sample.
    assert peaks["save"] - peaks["recompute"] >= 0.8 * matrices


@pytest.mark.usefixtures("one_sample_at_a_time")
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_needed(backend: str):
    tensors = Case(3, 2, 12, (3, 3)).make(torch.float32)
    full = torch.autograd.grad(_total(tensors, backend=backend, memory="recompute"), tensors)
    for needed in ([0], [1, 2]):
        some = [t if i in needed else t.detach() for i, t in enumerate(tensors)]
        value = _total(some, backend=backend, memory="recompute")
        grads = torch.autograd.grad(value, [some[i] for i in needed])
        assert all(torch.equal(g, full[i]) for g, i in zip(grads, needed, strict=True))


@pytest.mark.usefixtures("one_sample_at_a_time")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_graph_may_be_kept_and_nothing_is_written(backend: str):
    tensors = Case(2, 3, 20, (4, 5), "mixed").make(torch.float32)
    before = [t.detach().clone() for t in tensors]
    parts = rep_mtl_loss(tensors, backend=backend, memory="recompute")
    first = torch.autograd.grad(parts.total, tensors, retain_graph=True)
    second = torch.autograd.grad(parts.total, tensors, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t.detach(), b) for t, b in zip(tensors, before, strict=True))
    plain = rep_mtl_loss(tensors, backend=backend)
    for name in ("tsr", "csa"):
        actual, expected = (
            torch.autograd.grad(getattr(p, name), tensors, retain_graph=True)
            for p in (parts, plain)
        )
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend: str):
    tensors = Case(2, 3, 20, (4, 5)).make(torch.float32)
    with torch.no_grad():
        tensors[0][1, 2, 0, 0] = float("nan")
    value = csa_loss(tensors, backend=backend, memory="recompute")
    assert value.isnan()
    assert torch.autograd.grad(value, tensors)[0][1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend: str):
    tensors = Case(2, 2, 3, (2, 2)).make(torch.float32)
    value = csa_loss(tensors, backend=backend, memory="recompute")
    grads = torch.autograd.grad(value, tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="repmtl_kernels.reference"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)


def test_inside_a_compiler():
    tensors = Case(2, 3, 12, (3, 3)).make(torch.float32)
    loss = partial(csa_loss, memory="recompute")
    torch.compiler.reset()
    compiled = torch.compile(lambda *s: loss(s), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(tensors), tensors)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)


@pytest.mark.parametrize("function", [csa_loss, rep_mtl_loss])
def test_the_reference_keeps_what_it_keeps(function, monkeypatch: pytest.MonkeyPatch):
    tensors = Case(2, 2, 3, (2, 2)).make(torch.float32)
    function(tensors, backend="reference", memory="save")
    with pytest.raises(ValueError, match="^memory: .*got 'recompute'"):
        function(tensors, backend="reference", memory="recompute")
    with pytest.raises(ValueError, match="^memory: .*got 'recompute'"):
        reference.csa_loss(tensors, memory="recompute")
    monkeypatch.setenv("REPMTL_BACKEND", "reference")
    with pytest.raises(ValueError, match="^memory: .*got 'recompute'"):
        function(tensors, memory="recompute")


def test_matrices_are_never_larger_than_the_saliencies():
    """Why "auto" saves them."""
    for shape in SHAPES.values():
        assert kept.matrices(shape) <= kept.saliencies(shape)
        assert kept.at_a_time(shape) <= kept.matrices(shape)


def test_table_in_the_documentation_is_up_to_date():
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    assert f"<!-- bench:kept:simulated -->\n{kept.table()}\n<!-- /bench -->" in text


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="counts what PyTorch allocates on the CPU")
def test_checkpointed_heads_save_nothing_with_the_regulariser():
    """As docs/memory.md says; in the encoder it does save."""
    rows = {row["checkpointed"]: row for row in kept.checkpointed(torch.device("cpu"), side=16)}
    peak = {what: row["rep_mtl_peak_mb"] for what, row in rows.items()}
    assert abs(peak["heads"] / peak["nothing"] - 1) < 0.01
    assert peak["encoder"] < 0.9 * peak["nothing"]
    peak = {what: row["equal_weighting_peak_mb"] for what, row in rows.items()}
    assert max(peak["heads"], peak["encoder"]) < 0.8 * peak["nothing"]


# --- checkpointing ---


class Head(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
        )


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d(6, momentum=None)  # a cumulative mean
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Tanh())
        self.heads = nn.ModuleList([Head(), Head()])
        self.to(DEVICE, torch.float64)

    def run(self, part: nn.Module, x: torch.Tensor, way: str) -> torch.Tensor:
        if way == "no":
            return part(x)
        options = {"context_fn": checkpoint_contexts(part)} if way == "contexts" else {}
        return checkpoint(part, x, use_reentrant=False, **options)

    def step(self, way: str, criterion: RepMTL) -> None:
        x = torch.randn(
            3, 3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ).to(DEVICE)
        z = self.run(self.encoder, x, way)
        losses = [self.run(head, z, way).square().mean() for head in self.heads]
        criterion(losses, z).backward()


def _state(network: Network) -> tuple[dict, dict]:
    grads = {name: p.grad for name, p in network.named_parameters()}
    return grads, dict(network.named_buffers())


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_checkpointed_heads_and_encoder(converted: bool, memory: str):
    """Running statistics are updated once a step, as without; PyTorch alone does it again."""
    plain, actual, bare = (Network() for _ in range(3))
    for other in (actual, bare):
        other.load_state_dict(plain.state_dict())
    if converted:
        convert_second_order(actual.heads)
    before = dict(actual.named_buffers())
    for _ in range(2):
        plain.step("no", RepMTL(0.5, 0.5))
        actual.step("contexts", RepMTL(0.5, 0.5, memory=memory))
        bare.step("checkpoint", settled(RepMTL(0.5, 0.5)))
    (grads, buffers), (expected, once) = _state(actual), _state(plain)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(buffers, once)
    assert all(buffers[name] is before[name] for name in before)
    # Without the contexts they are updated twice in the encoder, in heads three times.
    counts = {name: b.item() for name, b in bare.named_buffers() if name.endswith("tracked")}
    assert counts == {
        "encoder.1.num_batches_tracked": 4,
        "heads.0.1.num_batches_tracked": 6,
        "heads.1.1.num_batches_tracked": 6,
    }


def test_checkpointing_without_the_regulariser():
    plain = Network()
    actual = copy.deepcopy(plain)
    plain.step("no", RepMTL(0.5, 0.5).eval())
    actual.step("contexts", RepMTL(0.5, 0.5).eval())
    torch.testing.assert_close(_state(actual), _state(plain))


def test_the_function_runs_again_on_what_the_forward_found():
    """A module whose result depends on a buffer that it updates, shared by two."""

    class Counting(nn.Module):
        def __init__(self, count: torch.Tensor):
            super().__init__()
            self.register_buffer("count", count)

        def forward(self, x):
            self.count += 1
            return x.exp() * self.count.clone()

    count = torch.zeros((), device=DEVICE)
    layers = nn.Sequential(Counting(count), Counting(count))
    x = torch.ones(2, device=DEVICE, requires_grad=True)
    contexts = checkpoint_contexts(layers)
    y = checkpoint(layers, x, use_reentrant=False, context_fn=contexts)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    fresh = nn.Sequential(Counting(count.clone().zero_()), Counting(count.clone().zero_()))
    fresh[1].count = fresh[0].count
    (expected,) = torch.autograd.grad(fresh(x).sum(), x)
    torch.testing.assert_close([first, second], [expected, expected])
    assert count == 2 and layers[0].count is count and layers[1].count is count


def test_buffers_are_put_back_after_an_error():
    layer = nn.BatchNorm1d(3)
    buffers = dict(layer.named_buffers())
    forward, again = checkpoint_contexts(layer)()
    assert isinstance(forward, nullcontext)
    with pytest.raises(ArithmeticError), again:
        assert layer.running_mean is not buffers["running_mean"]
        raise ArithmeticError
    assert all(getattr(layer, name) is buffer for name, buffer in buffers.items())


@pytest.mark.parametrize("modules", [(), (Head, 3), (print,)], ids=["none", "class", "function"])
def test_message_for_what_is_no_module(modules):
    with pytest.raises(TypeError, match="^modules: expected .*torch.nn.Module"):
        checkpoint_contexts(*modules)
