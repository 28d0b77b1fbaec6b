"""The weighting for LibMTL, on a stand-in for LibMTL; examples/libmtl_checkout.py has LibMTL."""

import copy
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from cases import settled
from libmtl_stand_in.LibMTL.architecture import HPS
from summaries import assert_same
from torch import nn

from repmtl_kernels import Levels, RepMTL, SaliencyMonitor
from repmtl_kernels._heads import preflight
from repmtl_kernels.integrations.libmtl import RepMTLWeighting, register

TASKS = ["a", "b", "c"]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
STRONG = {"lambda_tsr": 0.9, "lambda_csa": 0.7}


class Encoder(nn.Module):
    """An encoder with one representation or, as in attention architectures, one for each task."""

    def __init__(self, per_task):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh())
        self.gates = nn.ParameterList([torch.rand(6, 1, 1) for _ in TASKS]) if per_task else None

    def forward(self, x):
        z = self.trunk(x)
        return z if self.gates is None else [gate * z for gate in self.gates]


def decoder():
    return nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 2, 1))


class Model(HPS, RepMTLWeighting):
    """The model that LibMTL's Trainer makes."""

    def __init__(self, *, rep_grad=True, multi_input=False, per_task=False):
        encoder, decoders = partial(Encoder, per_task), nn.ModuleDict({t: decoder() for t in TASKS})
        super().__init__(TASKS, encoder, decoders, rep_grad, multi_input, torch.device("cpu"))
        self.init_param()
        self.double()


def stacked_losses(model, x, y, *, samples=True):
    """Return the losses as LibMTL does: in one tensor, which may be stacked over samples."""
    losses = torch.zeros(len(TASKS), dtype=torch.float64)
    preds = {} if model.multi_input else model(x)
    for i, t in enumerate(TASKS):
        if model.multi_input:
            preds = model(x + i, t)
        losses[i] = (preds[t] - y[t]).square().mean()
    return torch.stack([losses]).squeeze(0) if samples else losses


def attached_losses(model, x, y):
    """Return the losses without detaching, and the representations."""
    z = model.encoder(x)
    shared = not (model.multi_input or isinstance(z, list))
    if model.multi_input:
        z = [model.encoder(x + i) for i in range(len(TASKS))]
    inputs = [z] * len(TASKS) if shared else z
    losses = {t: (model.decoders[t](inputs[i]) - y[t]).square().mean() for i, t in enumerate(TASKS)}
    return losses, z if shared else dict(zip(TASKS, z, strict=True))


@pytest.fixture
def batch():
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    return x, {t: torch.randn(4, 2, 5, 6, dtype=torch.float64) for t in TASKS}


def assert_same_gradients(model, expected):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


KINDS = {
    "single input": {},
    "representation per task": {"per_task": True},
    "multi-input": {"multi_input": True},
}
OPTIONS = {
    "plain": STRONG,
    "log losses": {**STRONG, "log_losses": True},
    "weights": {**STRONG, "task_weights": {"a": 0.5, "b": 2.0, "c": 1.0}},
    "strength and clip": {**STRONG, "strength": 0.3, "clip": 0.5},
    "off": {"lambda_tsr": 0.0, "lambda_csa": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_gradients_are_those_of_the_criterion(batch, kind, options):
    model = Model(**kind)
    plain = copy.deepcopy(model)
    RepMTL(**options)(*attached_losses(plain, *batch)).backward()
    weights = model.backward(stacked_losses(model, *batch), **options)
    assert_same_gradients(model, plain)
    np.testing.assert_array_equal(weights, list(options.get("task_weights", {}).values()) or 1)
    assert weights.shape == (3,)
    assert set(model.criterion.last.losses) == set(TASKS)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_stack_costs_no_passes(batch, kind):
    """A head has two backward passes, for saliency and total; the encoder one for each input."""
    model = Model(**kind)
    passes = dict.fromkeys(TASKS, 0)
    encoder_passes = []

    def count(task):
        def hook(_module, _inputs, output):
            def passed(_grad):
                passes[task] += 1

            output.register_hook(passed)

        return hook

    for task, head in model.decoders.items():
        head.register_forward_hook(count(task))
    model.encoder.trunk.register_forward_hook(
        lambda _module, _inputs, output: output.register_hook(encoder_passes.append) and None
    )
    settled(model._criterion(STRONG))
    model.backward(stacked_losses(model, *batch), **STRONG)
    assert passes == dict.fromkeys(TASKS, 2)
    assert len(encoder_passes) == (3 if kind.get("multi_input") else 1)


class Pyramid(Encoder):
    """An encoder with two levels; decoder c uses only the first."""

    def __init__(self, per_task):
        super().__init__(per_task=False)
        self.second = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        coarse = nn.functional.avg_pool2d(self.second(x), 2)
        return Levels(fine=self.trunk(x), coarse=coarse.tanh())


class OfLevels(nn.Module):
    def __init__(self, task):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(6, 2, 1), nn.Conv2d(3, 2, 1) if task != "c" else None

    def forward(self, z):
        y = torch.tanh(self.fine(z["fine"]))
        if self.coarse is None:
            return y
        return y * torch.tanh(self.coarse(z["coarse"])).mean((2, 3), keepdim=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_encoder_that_returns_levels(batch, options):
    model = Model()
    model.encoder = Pyramid(False)
    model.decoders = nn.ModuleDict({t: OfLevels(t) for t in TASKS})
    model.double()
    plain = copy.deepcopy(model)
    RepMTL(**options)(*attached_losses(plain, *batch)).backward()
    model.backward(stacked_losses(model, *batch), **options)
    assert_same_gradients(model, plain)


def test_options_that_change_leave_the_state(batch, monkeypatch):
    """The count, the running means and the list of checked tasks stay."""
    walks, check_losses = [], preflight.check_losses
    monkeypatch.setattr(
        preflight,
        "check_losses",
        lambda *a: walks.append([t.key for t in a[0]]) or check_losses(*a),
    )
    model = Model()
    for step in range(3):
        weights = dict.fromkeys(TASKS, 1.0 + step)
        model.backward(stacked_losses(model, *batch), **STRONG, task_weights=weights)
        assert model.criterion.get_extra_state()[0] == step + 1
    assert walks == [TASKS]


def test_losses_that_are_not_stacked_by_sample(batch):
    """LibMTL 1.1.5 does not stack the tensor with the losses."""
    model = Model()
    plain = copy.deepcopy(model)
    RepMTL(**STRONG)(*attached_losses(plain, *batch)).backward()
    model.backward(stacked_losses(model, *batch, samples=False), **STRONG)
    assert_same_gradients(model, plain)


def test_options_change_and_the_count_goes_on(batch):
    """Each step passes its options, and the state is part of the model's."""
    model = Model()
    assert "criterion._extra_state" in model.state_dict()
    applied = []
    for options in (
        {"every": 3, "lambda_tsr": 0.5},
        {"every": 3, "lambda_tsr": 0.25},
        {"every": 3, "lambda_tsr": 0.25},
    ):
        model.backward(stacked_losses(model, *batch), **options)
        applied.append(model.criterion.last.applied)
        assert model.criterion.lambda_tsr == options["lambda_tsr"]
    assert applied == [True, False, False]
    resumed = Model()
    resumed.load_state_dict(model.state_dict())
    resumed.backward(stacked_losses(resumed, *batch), every=2)
    assert not resumed.criterion.last.applied  # the fourth call; a new count would apply it


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_monitor_sees_the_steps_of_a_plain_loop(batch, kind):
    """Some observations are of steps with the regulariser, and an option changes in between."""
    model, monitors = Model(**kind), [SaliencyMonitor(every=2), SaliencyMonitor(every=2)]
    plain, criterion = copy.deepcopy(model), RepMTL(**STRONG, every=3, monitor=monitors[1])
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, plain)]
    for step in range(7):
        for optimizer in optimizers:
            optimizer.zero_grad()
        criterion.lambda_tsr = 0.9 if step < 4 else 0.5
        options = {**STRONG, "lambda_tsr": criterion.lambda_tsr, "every": 3}
        model.backward(stacked_losses(model, *batch), **options, monitor=monitors[0])
        criterion(*attached_losses(plain, *batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
    summary = monitors[0].summary()
    assert summary.history.steps.tolist() == [0, 2, 4, 6] and summary.tasks == (*TASKS,)
    assert_same(summary, monitors[1].summary(), 1e-9)


def test_a_checkpoint_has_the_monitor(batch):
    """LibMTL's Trainer loads it before the weighting knows of a monitor."""
    whole, first, resumed = Model(), Model(), Model()
    monitors = [SaliencyMonitor(every=2) for _ in range(3)]
    for model in (whole, first):
        model.load_state_dict(resumed.state_dict())
    for model, monitor, steps in zip((whole, first), monitors, (5, 3), strict=False):
        for _ in range(steps):
            model.backward(stacked_losses(model, *batch), monitor=monitor)
    resumed.load_state_dict(first.state_dict(), strict=False)
    for _ in range(2):
        resumed.backward(stacked_losses(resumed, *batch), monitor=monitors[2])
    assert monitors[2].summary().history.steps.tolist() == [0, 2, 4]
    assert_same(monitors[2].summary(), monitors[0].summary(), 1e-9)


def test_frozen_heads_and_repeated_steps(batch):
    """Gradients accumulate until zero_grad, as with any backward pass."""
    model = Model()
    model.decoders.requires_grad_(False)
    model.backward(stacked_losses(model, *batch), **STRONG)
    once = [p.grad.clone() for p in model.encoder.parameters()]
    model.backward(stacked_losses(model, *batch), **STRONG)
    for p, first in zip(model.encoder.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * first, **TIGHT)
    assert all(p.grad is None for p in model.decoders.parameters())


def test_bad_arguments(batch):
    model = Model(rep_grad=False)
    losses = stacked_losses(model, *batch)
    with pytest.raises(ValueError, match="rep_grad: .* expected Trainer.rep_grad=True., got False"):
        model.backward(losses)
    model = Model()
    losses = stacked_losses(model, *batch)
    with pytest.raises(ValueError, match="losses: expected shape .3,., .* got .2,."):
        model.backward(losses[:2])
    with pytest.raises(TypeError, match="lambda_trs"):
        model.backward(losses, lambda_trs=0.1)


def test_register(monkeypatch):
    weightings = types.ModuleType("LibMTL.weighting")
    weightings.EW = object
    library = types.ModuleType("LibMTL")
    library.weighting = weightings
    monkeypatch.setitem(sys.modules, "LibMTL", library)
    monkeypatch.setitem(sys.modules, "LibMTL.weighting", weightings)
    assert register() == register() == "RepMTL"
    # The Trainer looks it up in this way.
    assert weightings.__dict__["RepMTL"] is RepMTLWeighting
    with pytest.raises(ValueError, match="name: LibMTL has a weighting 'EW' already"):
        register("EW")
