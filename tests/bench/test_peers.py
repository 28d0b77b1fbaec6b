"""The benchmark's own forms of Nash-MTL and FairGrad: torchjd's gradients, with fewer passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from benchmarks.networks import Batch, Model, Network, random_batch, task_loss
from benchmarks.peers import AtRepresentation, ByTorchjd, Forward, SinglePass, fairgrad, nash_mtl
from benchmarks.phases import Phases, Unmarked

pytest.importorskip("torchjd")

CPU = torch.device("cpu")
SHARED = Network(
    "shared", {"segmentation": 3, "depth": 1, "normals": 3}, 3, 64, 64,
    encoder="resnet18", base=8, dilations=(1, 2, 3),
)  # fmt: skip
MULTI_INPUT = Network(
    "multi", {"a": 4, "b": 5, "c": 6}, 4, 32, 32, encoder="resnet18", base=4, multi_input=True
)
NETWORKS = [SHARED, MULTI_INPUT]
AGGREGATORS = [nash_mtl, fairgrad]


def setting(network: Network) -> tuple[Model, Batch]:
    torch.manual_seed(0)
    model = network.model().double()
    batch = random_batch(network, CPU)
    labels = {t: v.double() if v.is_floating_point() else v for t, v in batch.labels.items()}
    return model, Batch([images.double() for images in batch.images], labels)


def forward(network: Network, model: Model, batch: Batch) -> Forward:
    """The same losses at every call."""
    torch.manual_seed(1)  # dropout
    z = [model.encoder(images) for images in batch.images]
    heads = [model.heads[task] for task in network.tasks]
    of_tasks = z if network.multi_input else z * len(heads)
    losses = [
        task_loss(task, head(r), batch.labels[task])
        for task, head, r in zip(network.tasks, heads, of_tasks, strict=True)
    ]
    return Forward(model.encoder, heads, losses, z)


def gradients(network: Network, form) -> dict[str, Tensor]:
    model, batch = setting(network)
    form.backward(forward(network, model, batch), Unmarked())
    return {name: p.grad for name, p in model.named_parameters()}


def differ(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_single_pass_gives_the_gradients_of_torchjd(aggregator, network):
    mine, theirs = (form(aggregator(3)) for form in (SinglePass, ByTorchjd))
    found, expected = gradients(network, mine), gradients(network, theirs)
    for name, value in expected.items():
        # Rounding alone: convolutions before a batch norm have gradients near zero.
        assert (found[name] - value).norm() <= 1e-9 * (value.norm() + 1e-3), name


@pytest.mark.parametrize("chunk", [None, 1])
def test_both_ways_through_torchjd_agree(chunk):
    form = ByTorchjd(fairgrad(3))
    expected = gradients(SHARED, form)
    form.chunk = chunk
    found = gradients(SHARED, form)
    assert all(torch.allclose(found[n], g, 1e-9, 1e-12) for n, g in expected.items())


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_weights_at_the_representation(aggregator):
    form = AtRepresentation(aggregator(3))
    found = gradients(SHARED, form)
    model, batch = setting(SHARED)
    f = forward(SHARED, model, batch)
    (z,) = f.representations
    rows = [torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in f.losses]
    weights = aggregator(3).weighting(torch.stack(rows))
    assert weights.std() > 1e-3 * weights.mean(), "the tasks are weighed apart"
    total = sum(w * loss for w, loss in zip(weights, f.losses, strict=True))
    parameters = dict(model.encoder.named_parameters())
    expected = torch.autograd.grad(total, parameters.values(), retain_graph=True)
    for name, value in zip(parameters, expected, strict=True):
        assert differ(found[f"encoder.{name}"], value) < 1e-9, name
    for task, head, loss in zip(SHARED.tasks, f.heads, f.losses, strict=True):
        parameters = dict(head.named_parameters())
        expected = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
        for name, value in zip(parameters, expected, strict=True):
            assert torch.allclose(found[f"heads.{task}.{name}"], value, 1e-9, 1e-12), name


@pytest.mark.parametrize(
    ("network", "form", "encoder_passes"),
    [
        (SHARED, SinglePass, 3),
        (SHARED, AtRepresentation, 1),
        (MULTI_INPUT, SinglePass, 3),  # one for each task's own batch
    ],
)
def test_every_head_is_passed_once(network, form, encoder_passes):
    passes = Counter()
    model, batch = setting(network)

    def count(name: str):
        def on_forward(module, inputs, output):
            output.register_hook(lambda _: passes.update([name]))

        return on_forward

    model.encoder[0].register_forward_hook(count("encoder"))
    for task, head in model.heads.items():
        head.register_forward_hook(count(task))
    form(fairgrad(3)).backward(forward(network, model, batch), Unmarked())
    assert passes == {"encoder": encoder_passes} | dict.fromkeys(network.tasks, 1)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
@pytest.mark.parametrize("chunk", [None, 1])
def test_the_phases_of_torchjd_are_seen_from_outside(chunk, network):
    form = ByTorchjd(fairgrad(3))
    form.chunk = chunk
    model, batch = setting(network)
    marks = Phases(CPU)

    def note(name: str):
        return lambda *_: marks.mark(name)

    model.encoder[0].register_forward_hook(
        lambda _, x, y: y.register_hook(note("encoder")) and None
    )
    for head in model.heads.values():
        head.register_forward_hook(lambda _, x, y: y.register_hook(note("head")) and None)
    form.backward(forward(network, model, batch), marks)
    in_encoder = marks.names.count("encoder")
    assert in_encoder >= 1
    assert marks.names == [
        *3 * ["head"], "heads_backward", *in_encoder * ["encoder"], "encoder_backward", "weighting"
    ]  # fmt: skip


def test_torchjd_runs_the_way_that_is_faster(monkeypatch):
    form = ByTorchjd(fairgrad(3))
    clock = [0.0]

    def step():
        clock[0] += {None: 2.0, 1: 1.0}[form.chunk]

    monkeypatch.setattr("benchmarks.peers.time.perf_counter", lambda: clock[0])
    form.tune(step, lambda: None)
    assert form.chunk == 1
