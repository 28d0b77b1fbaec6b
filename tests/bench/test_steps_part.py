"""The networks of the field and the training step of every method on them."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch
from stand_ins import CPU, HEAD, new_run

from benchmarks import methods, networks, phases
from benchmarks.cases import FLOAT32
from benchmarks.parts import steps
from benchmarks.timing import Timing
from repmtl_kernels import RepMTL
from repmtl_kernels._training.strength import is_measured

SMALL_NETWORK = networks.Network(
    "nyuv2", {"segmentation": 3, "depth": 1, "normals": 3}, 2, 64, 64,
    encoder="resnet18", base=8, dilations=(1, 2, 3),
)  # fmt: skip
SMALL_OFFICE = networks.Network(
    "office", {"a": 3, "b": 3}, 3, 32, 32, encoder="resnet18", base=4, multi_input=True
)


@pytest.mark.parametrize(
    ("name", "encoder", "heads", "shared"),
    [
        # As torchvision counts them: resnet50 without its last layer, DeepLabHead(2048, classes).
        ("nyuv2", 23_508_032, [16_128_781, 16_125_697, 16_126_211], (8, 2048, 36, 48)),
        ("cityscapes", 23_508_032, [16_127_239, 16_125_697], (64, 2048, 16, 32)),
        # resnet18, a hidden layer of 512 with batch norm; linear heads.
        ("office", 11_176_512 + 513 * 512 + 1024, 4 * [65 * 513], (64, 512)),
    ],
)
def test_networks_are_the_fields(name, encoder, heads, shared):
    network = next(n for n in networks.NETWORKS if n.name == name)
    with torch.device("meta"):
        model = network.model()
        z = model.encoder(torch.empty(network.batch, 3, network.height, network.width))
        outputs = [model.heads[task](z).shape for task in network.tasks]
    assert count(model.encoder) == encoder
    assert [count(model.heads[task]) for task in network.tasks] == heads
    assert z.shape == shared
    size = () if network.multi_input else (network.height, network.width)
    assert outputs == [(network.batch, n, *size) for n in network.tasks.values()]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_a_dilated_encoder_sees_as_far_as_the_strided_one():
    """As LibMTL and torchvision dilate it: a stage's first block has the dilation before it."""
    encoder = networks.resnet("resnet50", 8)
    blocks = [m for m in encoder if isinstance(m, networks.Block)]
    threes = [m for b in blocks for m in b.layers if getattr(m, "kernel_size", 0) == (3, 3)]
    dilations = [m.dilation[0] for m in threes]
    assert dilations == 3 * [1] + 4 * [1] + [1] + 5 * [2] + [2] + 2 * [4]
    assert [m.stride[0] for m in threes] == 3 * [1] + [2] + 12 * [1]


def test_a_cpu_gets_a_smaller_network_of_the_same_kind():
    for network in networks.NETWORKS:
        small = network.scaled("cpu")
        assert network.scaled("cuda") == network
        assert (small.tasks, small.encoder) == (network.tasks, network.encoder)
        ratios = {a / b for a, b in zip(small.dilations, network.dilations, strict=True)}
        assert network.multi_input or ratios == {small.width / network.width}
    assert str(small) == "ResNet-18, 4 linear heads, multi-input, B4 64x64"


@pytest.fixture(scope="module")
def step_rows() -> list[dict]:
    pytest.importorskip("torchjd")
    return [row for network in (SMALL_NETWORK, SMALL_OFFICE) for row in measured(network)]


def measured(network: networks.Network, makers=methods.METHODS) -> list[dict]:
    """Rows of all methods, with as few rounds as there can be."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MIN_ROUNDS", "MAX_ROUNDS", "PHASE_CYCLES"):
            patch.setattr(steps, name, 1)
        run = new_run()
        rows = steps.measure_case(run, math.inf, steps.Case(network, FLOAT32, makers))
    assert run.notes == []
    return rows


def test_step_rows_have_every_field(step_rows):
    fields = {
        "network", "method", "dtype", "architecture",
        "steps_per_s", "spread", "ratio_to_ew", "peak_mb", "rounds", "phases", "error",
    }  # fmt: skip
    of_nyuv2 = [row for row in step_rows if row["network"] == "nyuv2"]
    assert [row["method"] for row in of_nyuv2] == list(methods.METHODS)
    assert {row["method"] for row in step_rows if row["network"] == "office"} == {
        name for name in methods.METHODS if not name.endswith("_representation")
    }
    for row in step_rows:
        assert fields <= row.keys()
        assert row["error"] is None
        assert row["steps_per_s"] > 0
        assert row["peak_mb"] > 0
        assert row["rounds"] == 1
    assert of_nyuv2[0]["method"] == methods.EQUAL_WEIGHTING
    assert of_nyuv2[0]["ratio_to_ew"] == 1


def test_phases_of_a_step(step_rows):
    around = {"encoder_forward", "heads_forward", "heads_backward", "encoder_backward", "optimizer"}
    for row in step_rows:
        own = {"saliencies", "regularizer"} if row["method"].startswith("rep_mtl") else set()
        if row["method"] in methods.NEED_TORCHJD:
            own = {"weighting"}
        if row["method"] in (methods.DEFAULT, methods.MONITORED):
            assert row["phases"] == {}
            continue
        assert set(row["phases"]) == around | own, row["method"]
        assert list(row["phases"]) == [p for p in phases.PHASES if p in row["phases"]]


def watched_work(network, monkeypatch) -> tuple[methods.Work, list[torch.Tensor]]:
    """Return work whose steps all start from the same weights, and a list of their gradients."""
    monkeypatch.setattr(methods, "LEARNING_RATE", 0.0)
    work = methods.Work(network, torch.float32, CPU)
    seen: list[torch.Tensor] = []

    def see(*_):
        seen.append(torch.cat([p.grad.flatten() for p in work.model.parameters()]))

    work.optimizer.register_step_pre_hook(see)
    return work, seen


@pytest.mark.parametrize("network", [SMALL_NETWORK, SMALL_OFFICE], ids=lambda n: n.name)
def test_a_dissected_step_is_the_timed_one(network, monkeypatch):
    """Same gradients, and not those of equal weighting."""
    work, seen = watched_work(network, monkeypatch)
    method = methods.RepMTLMethod()
    method.criterion.lambda_csa = 1.0
    (number,) = method.calls
    for each, marks in (
        (method, None),
        (method, phases.Phases(CPU)),
        (methods.EqualWeighting(), None),
    ):
        torch.manual_seed(1)  # dropout
        work.step(each, number, marks)
    timed, dissected, equal = seen
    torch.testing.assert_close(timed, dissected, rtol=1e-3, atol=1e-5)
    assert (timed - equal).norm() > 1e-2 * equal.norm()


def test_a_step_is_the_mean_of_its_kinds():
    step = steps.mean([(Timing(80.0, 8.0, 3), 0.25), (Timing(20.0, 0.0, 3), 0.75)])
    assert step == Timing(35.0, 2.0, 3)
    row = steps.figures(step, Timing(10.0, 0.0, 3), 1.0)
    assert (row["steps_per_s"], row["ratio_to_ew"]) == (pytest.approx(28.571), 3.5)


@pytest.mark.parametrize("every", [1, 4])
def test_calls_of_the_default_stand_for_a_period(every, monkeypatch):
    """Each share is that of the criterion's own calls, which apply, measure or do neither."""
    monkeypatch.setattr(methods, "RepMTL", partial(RepMTL, every=every))
    method, turns = methods.Default(), Counter()
    options = method.criterion._checked_options()
    for number in range(24 * every, 48 * every):
        turns[kind(options, number)] += 1
    shares = {kind(options, number): share for number, share in method.calls.items()}
    assert shares == {k: pytest.approx(count / (24 * every)) for k, count in turns.items()}
    method.begin(24 * every)
    assert method.criterion._progress.calls == 24 * every
    assert not method.criterion._progress.ratio.is_empty


def test_calls_with_a_monitor_stand_for_a_period():
    """Each share is that of the calls that apply, measure, are observed, or several of these."""
    method, turns = methods.Monitored(), Counter()
    options, every = method.criterion._checked_options(), method.criterion.monitor.every
    for number in range(2400, 4800):
        turns[(*kind(options, number), number % every == 0)] += 1
    shares = {(*kind(options, n), n % every == 0): share for n, share in method.calls.items()}
    assert shares == {k: pytest.approx(count / 2400) for k, count in turns.items()}
    work = methods.Work(SMALL_NETWORK, torch.float32, CPU)
    work.cycle(method)
    observed = sum(number % every == 0 for number in method.calls)
    assert method.criterion.monitor.summary().observations == observed == 3


def test_what_a_monitor_adds_is_said():
    rows = {"rep_mtl_monitored": {"steps_per_s": 8.0}, "rep_mtl_default": {"steps_per_s": 8.2}}
    columns = {"nyuv2": rows, "office": {"rep_mtl_default": rows["rep_mtl_default"]}}
    assert steps.monitor_text(columns) == " A monitor adds 2.5 % (nyuv2) to a step."
    assert steps.monitor_text({"office": columns["office"]}) == ""


def kind(options, number: int) -> tuple[bool, bool]:
    turn = options.turn(number)
    return turn.weight > 0, turn.weight > 0 and is_measured(turn.applications)


def test_a_step_that_runs_out_of_memory_is_a_row():
    class TooLarge(methods.EqualWeighting):
        def backward(self, forward, marks):
            sum(forward.losses).backward()
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    names = {
        methods.EQUAL_WEIGHTING: lambda _: methods.EqualWeighting(),
        "rep_mtl_reference": lambda _: TooLarge(),
        "rep_mtl": lambda _: methods.RepMTLMethod(),
    }
    rows = measured(SMALL_NETWORK, names)
    last = rows[-1]
    assert (last["method"], last["steps_per_s"]) == ("rep_mtl_reference", None)
    assert "1 TiB" in last["error"]
    assert [r["method"] for r in rows if r["error"] is None] == [methods.EQUAL_WEIGHTING, "rep_mtl"]
    assert steps.broken(rows) == []
    assert steps.broken([last | {"error": "RuntimeError: no"}]) != []
    table = steps.table({**HEAD, "notes": [], "rows": rows})
    assert "| Rep-MTL, reference losses | out of memory |" in table


def test_what_there_is_no_time_for_is_noted():
    run = new_run(deadline=0.0)
    steps.measure(run)
    assert run.rows == []
    notes = [note for note in run.notes if "torchjd is not installed" not in note]
    assert len(notes) == len(steps.cases("cpu", quick=False))
    run = new_run()
    rows = steps.measure_case(run, 0.0, steps.Case(SMALL_NETWORK, FLOAT32))
    assert [row["method"] for row in rows] == [methods.EQUAL_WEIGHTING]
    others = list(steps.Case(SMALL_NETWORK, FLOAT32).methods())[1:]
    assert run.notes == [f"left out for time on nyuv2, float32: {', '.join(others)}"]


def test_without_torchjd_the_other_methods_are_measured(monkeypatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    assert set(steps.Case(SMALL_NETWORK, FLOAT32).methods()) == set(methods.METHODS) - set(
        methods.NEED_TORCHJD
    )
    run = new_run(quick=True, deadline=0.0)
    steps.measure(run)
    assert run.notes[0].startswith("torchjd is not installed: left out nash_mtl, fairgrad, ")
