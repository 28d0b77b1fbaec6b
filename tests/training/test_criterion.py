"""RepMTL and task_saliencies against equation 10 written out with the reference losses."""

from __future__ import annotations

import pytest
import torch
from small_network import LAMBDAS, PRESENT, TASKS, Network, assert_same_step, batch, literal

import repmtl_kernels
from repmtl_kernels import RepMTL, reference, rep_mtl_loss, task_saliencies


@pytest.mark.parametrize("backend", ("auto", "eager", "reference"))
@pytest.mark.parametrize(
    "options, theirs",
    [
        ({}, {}),
        ({"log_losses": True}, {"log_losses": True}),
        ({"task_weights": [0.5, 2, 0]}, {"weights": [0.5, 2.0, 0.0]}),
        (
            {"log_losses": True, "task_weights": (0.3, 1.0, 4.0)},
            {"log_losses": True, "weights": [0.3, 1.0, 4.0]},
        ),
        (
            {"over": "space", "normalizer": "softmax"},
            {"over": "space", "normalizer": "softmax"},
        ),
        ({"log_losses": True, "log_offset": 0.3}, {"log_losses": True, "offset": 0.3}),
    ],
    ids=["plain", "log", "weights", "log-weights", "space-softmax", "offset"],
)
def test_total_and_gradients_are_equation_10(
    network: Network, backend: str, options: dict, theirs: dict
) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    criterion = RepMTL(**LAMBDAS, **options, backend=backend)
    total = criterion(losses, z)
    expected, tsr, csa = literal(losses, [z] * TASKS, **LAMBDAS, **theirs)
    assert_same_step(network, total, expected)
    last = criterion.last
    torch.testing.assert_close(last.tsr, tsr.detach())
    torch.testing.assert_close(last.csa, csa.detach())
    torch.testing.assert_close(last.regularizer, (0.9 * tsr + 0.7 * csa).detach())
    torch.testing.assert_close(last.total, expected.detach())
    assert last.applied is True
    assert last.losses == {t: loss.detach() for t, loss in enumerate(losses)}


@pytest.mark.parametrize(
    "lambdas",
    ({"lambda_tsr": 0.9, "lambda_csa": 0.7}, {"lambda_csa": 0}, {"lambda_tsr": 0}),
    ids=("both", "tsr", "csa"),
)
@pytest.mark.parametrize("softmax", (False, True), ids=("abs", "softmax"))
def test_options_reach_the_losses(network: Network, lambdas: dict, softmax: bool) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    lambdas = {**LAMBDAS, **lambdas}
    options = {"over": "space", "csa_temperature": 0.2, "eps": 1e-5}
    if softmax:
        options |= {"normalizer": "softmax", "tsr_temperature": 1e-3}
    else:
        options |= {"tsr_floor": 0.3}
    expected, *_ = literal(losses, [z] * TASKS, **lambdas, **options)
    for name in options:
        matters = lambdas["lambda_csa" if name == "csa_temperature" else "lambda_tsr"] != 0
        without = {key: value for key, value in options.items() if key != name}
        if matters and (name, softmax) != ("eps", True):
            changed, *_ = literal(losses, [z] * TASKS, **lambdas, **without)
            assert abs(changed - expected) > 1e-6, f"{name} makes no difference here"
    assert_same_step(network, RepMTL(**lambdas, **options)(losses, z), expected)


def test_dict_of_losses_in_any_order(network: Network) -> None:
    z = network.encoder(network.images())
    losses = dict(
        zip(("seg", "depth", "normal"), network.losses(z, network.targets()), strict=True)
    )
    weights = {"normal": 3.0, "seg": 0.5, "depth": 1.0}
    criterion = RepMTL(**LAMBDAS, task_weights=weights)
    weights["seg"] = 100.0  # the criterion has a copy
    total = criterion(losses, z)
    expected, *_ = literal(list(losses.values()), [z] * 3, **LAMBDAS, weights=[0.5, 1.0, 3.0])
    assert_same_step(network, total, expected)
    assert list(criterion.last.losses) == ["seg", "depth", "normal"]


@pytest.mark.parametrize("keyed", (False, True), ids=("list", "dict"))
def test_multi_input(network: Network, keyed: bool) -> None:
    z = [network.encoder(network.images()) for _ in range(TASKS)]
    losses = network.losses(z, network.targets())
    expected, *_ = literal(losses, z, **LAMBDAS)
    if keyed:
        task_losses = dict(zip("abc", losses, strict=True))
        representation = {"c": z[2], "a": z[0], "b": z[1]}
    else:
        task_losses, representation = losses, tuple(z)
    assert_same_step(network, RepMTL(**LAMBDAS)(task_losses, representation), expected)


def test_tokens_with_channels_last() -> None:
    torch.manual_seed(1)
    network = Network(tokens=True)
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    expected, *_ = literal(losses, [z] * TASKS, **LAMBDAS, channel_dim=-1)
    assert_same_step(network, RepMTL(**LAMBDAS, channel_dim=-1)(losses, z), expected)
    channels_first, *_ = literal(losses, [z] * TASKS, **LAMBDAS)
    assert not torch.isclose(channels_first, expected)


def test_present(network: Network) -> None:
    z = network.encoder(network.images())
    targets = network.targets()
    losses = [
        ((head(z) - y).square().mean((1, 2, 3)) * here).sum() / here.sum()
        for head, y, here in zip(network.heads, targets, PRESENT, strict=True)
    ]
    total = RepMTL(**LAMBDAS)(losses, z, PRESENT)
    expected, *_ = literal(losses, [z] * TASKS, **LAMBDAS, present=PRESENT)
    assert_same_step(network, total, expected)
    assert not torch.isclose(RepMTL(**LAMBDAS)(losses, z), expected)


def test_representation_that_is_a_leaf(network: Network) -> None:
    """The encoder's backward pass may be split off: z.grad has the regulariser's gradient too."""
    images, targets = network.images(), network.targets()
    z = network.encoder(images)
    leaf = z.detach().requires_grad_()
    RepMTL(**LAMBDAS)(network.losses(leaf, targets), leaf).backward()
    total = RepMTL(**LAMBDAS)(network.losses(z, targets), z)
    (expected,) = torch.autograd.grad(total, z)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("lambda_tsr, lambda_csa", [(0.9, 0), (0, 0.7), (0, 0.0)])
def test_weight_of_zero_turns_its_loss_off(
    network: Network, monkeypatch: pytest.MonkeyPatch, lambda_tsr: float, lambda_csa: float
) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    expected, tsr, csa = literal(losses, [z] * TASKS, lambda_tsr=lambda_tsr, lambda_csa=lambda_csa)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))
    criterion = RepMTL(lambda_tsr, lambda_csa)
    total = criterion(losses, z)
    assert len(calls) == (TASKS if lambda_tsr or lambda_csa else 0)
    assert_same_step(network, total, expected)
    last = criterion.last
    assert last.applied is bool(lambda_tsr or lambda_csa)
    for weight, value, want in ((lambda_tsr, last.tsr, tsr), (lambda_csa, last.csa, csa)):
        if weight:
            torch.testing.assert_close(value, want.detach())
        else:
            assert value is None
    if last.applied:
        want = lambda_tsr * tsr + lambda_csa * csa
        torch.testing.assert_close(last.regularizer, want.detach())
    else:
        assert last.regularizer is None


def test_batch_of_one_needs_csa_off(network: Network) -> None:
    z = network.encoder(network.images()[:1])
    losses = network.losses(z, [y[:1] for y in network.targets()])
    with pytest.raises(ValueError, match="^representation: .* at least 2; got B = 1"):
        RepMTL()(losses, z)
    criterion = RepMTL(0.9, lambda_csa=0)
    saliencies = task_saliencies(losses, z)
    expected = sum(losses) + 0.9 * reference.tsr_loss(saliencies)
    torch.testing.assert_close(criterion(losses, z), expected)


def test_single_task(network: Network) -> None:
    z = network.encoder(network.images())
    loss = network.losses(z, network.targets())[0]
    expected, tsr, _ = literal([loss], [z], **LAMBDAS)
    assert tsr == 0  # one task has all of the saliency
    assert_same_step(network, RepMTL(**LAMBDAS)([loss], z), expected)


def absent(values, task):
    """Return the list or dict with None for one task."""
    if isinstance(values, dict):
        return {t: None if t == task else value for t, value in values.items()}
    return [None if t == task else value for t, value in enumerate(values)]


@pytest.mark.parametrize("task", range(TASKS))
@pytest.mark.parametrize("keyed", (False, True), ids=("list", "dict"))
@pytest.mark.parametrize("multi", (False, True), ids=("shared", "multi-input"))
def test_absent_task(network: Network, task: int, keyed: bool, multi: bool) -> None:
    """Total, gradients and ratio are the same as without that task."""
    z = [network.encoder(network.images()) for _ in range(TASKS)]
    losses = network.losses(z, network.targets()) if multi else None
    if not multi:
        z = z[:1] * TASKS
        losses = network.losses(z[0], network.targets())
    weights = [0.5, 2.0, 3.0]
    rest = [t for t in range(TASKS) if t != task]
    expected, *_ = literal(
        [losses[t] for t in rest],
        [z[t] for t in rest],
        **LAMBDAS,
        weights=[weights[t] for t in rest],
        present=PRESENT[rest],
    )
    task_losses, representation = absent(losses, task), absent(z, task) if multi else z[0]
    if keyed:
        task_losses = dict(zip("abc", task_losses, strict=True))
        weights = dict(zip("abc", weights, strict=True))
        if multi:
            representation = dict(zip("abc", representation, strict=True))
    criterion = RepMTL(**LAMBDAS, task_weights=weights)
    mask = PRESENT.clone()
    mask[task] = ~mask[task]  # ignored
    assert_same_step(network, criterion(task_losses, representation, mask), expected)
    last = criterion.last
    assert list(last.losses) == (list("abc") if keyed else [0, 1, 2])
    assert [loss is None for loss in last.losses.values()] == [t == task for t in range(TASKS)]
    assert last.ratio.isfinite()
    plain = criterion.eval()(task_losses, None)
    torch.testing.assert_close(plain, expected.detach() - last.regularizer)


def test_step_under_second_order(network: Network) -> None:
    z = network.encoder(network.images())
    targets = network.targets()
    expected, *_ = literal(network.losses(z, targets), [z] * TASKS, **LAMBDAS)
    criterion = RepMTL(**LAMBDAS)
    with criterion.second_order() as context:
        losses = network.losses(z, targets)
    assert isinstance(context, type(repmtl_kernels._heads.second_order.second_order()))
    assert_same_step(network, criterion(losses, z), expected)
    assert criterion.last.ratio > 0


def test_default_step_is_the_sum_and_the_losses_bit_by_bit(network: Network) -> None:
    z, losses = batch(network)
    total = RepMTL(**LAMBDAS)(losses, z)
    expected = sum(losses) + rep_mtl_loss(task_saliencies(losses, z), **LAMBDAS).total
    parameters = list(network.parameters())
    got = torch.autograd.grad(total, parameters, retain_graph=True, materialize_grads=True)
    want = torch.autograd.grad(expected, parameters, materialize_grads=True)
    assert torch.equal(total, expected)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_task_saliencies(network: Network) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    saliencies = task_saliencies(losses, z)
    assert isinstance(saliencies, list)
    for saliency, loss in zip(saliencies, losses, strict=True):
        assert saliency.requires_grad
        assert saliency.shape == z.shape
        assert torch.equal(saliency, torch.autograd.grad(loss, z, retain_graph=True)[0])
    several = [network.encoder(network.images()) for _ in range(TASKS)]
    losses = dict(zip("abc", network.losses(several, network.targets()), strict=True))
    saliencies = task_saliencies(losses, dict(zip("abc", several, strict=True)))
    for saliency, task, own in zip(saliencies, "abc", several, strict=True):
        assert torch.equal(saliency, torch.autograd.grad(losses[task], own, retain_graph=True)[0])


def test_element_of_a_stack_within_one_task_is_accepted(network: Network) -> None:
    z = network.encoder(network.images())
    first, second, third = network.losses(z, network.targets())
    levels = torch.stack([first, third])
    expected = task_saliencies([first, second], z)
    for got, want in zip(task_saliencies([levels[0], second], z), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options", ({}, {"log_losses": True}, {"every": 4}), ids=("plain", "log", "every")
)
def test_training_run(options: dict) -> None:
    torch.manual_seed(2)
    network = Network()
    network.float()
    images, targets = network.images().float(), [y.float() for y in network.targets()]
    criterion = RepMTL(0.1, 0.1, **options)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    totals = []
    for _ in range(60):
        z = network.encoder(images)
        total = criterion(network.losses(z, targets), z)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if criterion.last.applied:
            totals.append(criterion.last.total.item())
    assert all(p.isfinite().all() for p in network.parameters())
    assert totals[-1] < totals[0] - 0.3


def test_public_names() -> None:
    assert {"RepMTL", "task_saliencies"} <= set(repmtl_kernels.__all__)
