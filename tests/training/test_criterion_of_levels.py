"""A criterion of several shared representations, against the equations at every level."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

from repmtl_kernels import Levels, RepMTL, SecondDerivativeError, reference, task_saliencies

SIZES = {"p3": (6, 5), "p4": (3, 2), "p5": (1, 1)}
CHANNELS = {"p3": 3, "p4": 5, "p5": 4}
TASKS = ("a", "b", "c")
BATCH = 4
LAMBDAS = {"lambda_tsr": 0.9, "lambda_csa": 0.7}
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


class Pyramid(nn.Module):
    """An encoder with three levels, and heads that use the levels named in ``uses``."""

    def __init__(self, uses: dict[str, tuple[str, ...]] | None = None) -> None:
        super().__init__()
        self.uses = uses or dict.fromkeys(TASKS, tuple(SIZES))
        self.encoder = nn.ModuleDict(
            {name: nn.Conv2d(2, CHANNELS[name], 3, padding=1) for name in SIZES}
        )
        self.heads = nn.ModuleDict(
            {
                task: nn.ModuleDict({name: nn.Conv2d(CHANNELS[name], 2, 1) for name in names})
                for task, names in self.uses.items()
            }
        )
        self.double().to(DEVICE)

    def images(self) -> dict[str, Tensor]:
        return {
            name: torch.randn(BATCH, 2, *size, dtype=torch.float64, device=DEVICE)
            for name, size in SIZES.items()
        }

    def levels(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.tanh(layer(x[name])) for name, layer in self.encoder.items()}

    def losses(self, z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            task: sum(torch.tanh(layer(z[name])).square().mean() for name, layer in head.items())
            for task, head in self.heads.items()
        }


@pytest.fixture
def pyramid() -> Pyramid:
    torch.manual_seed(0)
    return Pyramid()


def batch(pyramid: Pyramid) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    z = pyramid.levels(pyramid.images())
    return z, pyramid.losses(z)


def written_out(
    losses: dict[str, Tensor | None],
    z: dict[str, Tensor],
    present: Tensor | None = None,
    positions: dict[str, Tensor] | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the total, TSR and CSA, where TSR and CSA are means over the levels."""
    rows = {task: row for row, task in enumerate(losses)}
    losses = {task: loss for task, loss in losses.items() if loss is not None}
    by_level = {"tsr": [], "csa": []}
    for name, level in z.items():
        saliencies = {
            task: torch.autograd.grad(loss, level, create_graph=True, allow_unused=True)[0]
            for task, loss in losses.items()
        }
        saliencies = {task: s for task, s in saliencies.items() if s is not None}
        mask = None if positions is None else positions[name]
        labelled = None
        if present is not None:
            labelled = torch.stack([present[rows[task]] for task in saliencies])
        values = list(saliencies.values())
        by_level["tsr"].append(reference.tsr_loss(values, positions=mask))
        by_level["csa"].append(reference.csa_loss(values, present=labelled, positions=mask))
    tsr, csa = (torch.stack(values).mean() for values in by_level.values())
    lambdas = LAMBDAS | options
    return (
        sum(losses.values()) + lambdas["lambda_tsr"] * tsr + lambdas["lambda_csa"] * csa,
        tsr,
        csa,
    )


def assert_same_step(pyramid: Pyramid, total: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
    parameters = list(pyramid.parameters())
    got, want = (
        torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        for value in (total, expected)
    )
    torch.testing.assert_close(got, want, **TIGHT)


def as_levels(form: str, z: dict[str, Tensor]) -> Levels:
    return {
        "tensors": lambda: Levels(*z.values()),
        "list": lambda: Levels(list(z.values())),
        "dict": lambda: Levels(z),
        "names": lambda: Levels(**z),
        "levels": lambda: Levels(Levels(z)),
    }[form]()


@pytest.mark.parametrize("backend", ("reference", "eager", "auto"))
@pytest.mark.parametrize("form", ("tensors", "list", "dict", "names", "levels"))
def test_the_regulariser_is_the_mean_over_the_levels(pyramid, form: str, backend: str) -> None:
    z, losses = batch(pyramid)
    criterion = RepMTL(**LAMBDAS, backend=backend)
    total = criterion(losses, as_levels(form, z))
    expected, tsr, csa = written_out(losses, z)
    assert_same_step(pyramid, total, expected)
    torch.testing.assert_close(criterion.last.tsr, tsr.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(criterion.last.csa, csa.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("options", ({"lambda_csa": 0.0}, {"lambda_tsr": 0.0}), ids=str)
def test_one_loss_alone(pyramid: Pyramid, options: dict) -> None:
    z, losses = batch(pyramid)
    total = RepMTL(**LAMBDAS | options)(losses, Levels(z))
    assert_same_step(pyramid, total, written_out(losses, z, **options)[0])


def test_one_level_is_a_tensor(pyramid: Pyramid) -> None:
    z, losses = batch(pyramid)
    totals = [RepMTL(**LAMBDAS)(losses, form) for form in (Levels(z["p4"]), z["p4"])]
    assert torch.equal(*totals)


@pytest.mark.parametrize(
    "uses",
    (
        {"a": ("p3", "p4", "p5"), "b": ("p3", "p5"), "c": ("p4",)},
        {"a": ("p3", "p4"), "b": ("p4", "p5"), "c": ("p5", "p3")},
        {"a": ("p3",), "b": ("p4",), "c": ("p5",)},
    ),
    ids=("first uses all", "pairs", "one each"),
)
def test_a_task_is_left_out_where_it_does_not_use_a_level(uses: dict) -> None:
    torch.manual_seed(0)
    pyramid = Pyramid(uses)
    z, losses = batch(pyramid)
    present = torch.rand(len(TASKS), BATCH, device=DEVICE) < 0.8
    for mask in (None, present):
        total = RepMTL(**LAMBDAS)(losses, Levels(z), mask)
        assert_same_step(pyramid, total, written_out(losses, z, mask)[0])
    for (task, saliencies), (_, names) in zip(
        zip(TASKS, task_saliencies(losses, Levels(z)), strict=True), uses.items(), strict=True
    ):
        for name, saliency in zip(z, saliencies, strict=True):
            assert saliency.shape == z[name].shape
            assert bool(saliency.any()) is (name in names), (task, name)


def test_a_level_that_absent_tasks_alone_use_is_left_out() -> None:
    torch.manual_seed(0)
    pyramid = Pyramid({"a": ("p3",), "b": ("p3", "p5"), "c": ("p4",)})
    criterion = RepMTL(**LAMBDAS)
    for absent in ((), ("c",), ("b", "c")):
        z, losses = batch(pyramid)
        losses |= dict.fromkeys(absent)
        used = {n: z[n] for n in z if any(n in pyramid.uses[t] for t in TASKS if t not in absent)}
        total = criterion(losses, Levels(z))
        assert_same_step(pyramid, total, written_out(losses, used)[0])
    assert criterion.last.applied and list(used) == ["p3"]


def test_a_level_that_no_task_uses_is_refused() -> None:
    pyramid = Pyramid({"a": ("p3",), "b": ("p3", "p4")})
    z, losses = batch(pyramid)
    with pytest.raises(ValueError, match=r"representation\['p5'\]: expected a level that a loss"):
        RepMTL()(losses, Levels(z))


def test_absent_tasks_and_labels(pyramid: Pyramid) -> None:
    z, losses = batch(pyramid)
    losses["b"] = None
    present = torch.rand(len(TASKS), BATCH, device=DEVICE) < 0.7
    total = RepMTL(**LAMBDAS)(losses, Levels(z), present)
    assert_same_step(pyramid, total, written_out(losses, z, present)[0])


def test_positions_of_each_level(pyramid: Pyramid) -> None:
    z, losses = batch(pyramid)
    masks = {name: torch.rand(BATCH, *size, device=DEVICE) < 0.7 for name, size in SIZES.items()}
    expected = written_out(losses, z, positions=masks)[0]
    for form in (masks, list(masks.values()), tuple(masks.values()), Levels(masks)):
        assert_same_step(pyramid, RepMTL(**LAMBDAS)(losses, Levels(z), positions=form), expected)
    without_mask = masks | {"p4": torch.ones_like(masks["p4"])}
    expected = written_out(losses, z, positions=without_mask)[0]
    total = RepMTL(**LAMBDAS)(losses, Levels(z), positions=masks | {"p4": None})
    assert_same_step(pyramid, total, expected)


def test_strength_and_ratio_are_over_all_levels(pyramid: Pyramid) -> None:
    z, losses = batch(pyramid)
    criterion = RepMTL(strength=0.2, every=1)
    total = criterion(losses, Levels(z))
    tasks = sum(losses.values())
    sizes = []
    for value in (total - tasks, tasks):
        grads = torch.autograd.grad(value, list(z.values()), retain_graph=True)
        sizes.append(torch.cat([g.flatten() for g in grads]).norm())
    assert criterion.last.ratio.item() == pytest.approx(0.2, rel=1e-6)
    assert (sizes[0] / sizes[1]).item() == pytest.approx(0.2, rel=1e-6)


def test_clip_is_over_all_levels(pyramid: Pyramid) -> None:
    images = pyramid.images()
    criterion = RepMTL(**LAMBDAS, clip=0.5)
    for share in (1.0, 0.5):
        z = pyramid.levels(images)
        losses = pyramid.losses(z)
        total = criterion(losses, Levels(z))
        tasks = sum(losses.values())
        regulariser = written_out(losses, z)[0] - tasks
        parameters = list(pyramid.parameters())
        want = torch.autograd.grad(tasks + share * regulariser, parameters, retain_graph=True)
        got = torch.autograd.grad(total, parameters, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-10)


def test_schedules_and_evaluation(pyramid: Pyramid) -> None:
    criterion = RepMTL(**LAMBDAS, start=1, every=2)
    for call in range(4):
        z, losses = batch(pyramid)
        total = criterion(losses, Levels(z))
        weight = 2 if call % 2 else 0
        lambdas = {name: weight * value for name, value in LAMBDAS.items()}
        expected = written_out(losses, z, **lambdas)[0] if weight else sum(losses.values())
        assert_same_step(pyramid, total, expected)
    with torch.no_grad():
        z, losses = batch(pyramid)
        assert torch.equal(criterion.eval()(losses, Levels(z)), sum(losses.values()))


def test_each_loss_is_differentiated_once(pyramid, monkeypatch: pytest.MonkeyPatch) -> None:
    z, losses = batch(pyramid)
    criterion = RepMTL(**LAMBDAS)
    criterion(losses, Levels(z))
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))
    criterion(losses, Levels(z))
    assert len(calls) == len(TASKS)


def test_tokens_and_maps_together() -> None:
    """Levels may have different numbers of spatial dimensions."""
    torch.manual_seed(0)
    tokens = torch.randn(BATCH, 7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    pooled = torch.randn(BATCH, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    losses = {
        "a": tokens.tanh().square().mean() + pooled.sin().mean(),
        "b": (tokens**3).mean() * pooled.square().mean(),
    }
    total = RepMTL(**LAMBDAS, channel_dim=-1)(losses, Levels(tokens, pooled))
    expected = sum(losses.values())
    for z in (tokens, pooled):
        s = [torch.autograd.grad(loss, z, create_graph=True)[0] for loss in losses.values()]
        expected = expected + 0.45 * reference.tsr_loss(s, channel_dim=-1)
        expected = expected + 0.35 * reference.csa_loss(s, channel_dim=-1)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)


def test_multi_input_with_levels() -> None:
    torch.manual_seed(0)
    pyramids = {task: Pyramid({task: tuple(SIZES)}) for task in ("a", "b")}
    z = {task: pyramid.levels(pyramid.images()) for task, pyramid in pyramids.items()}
    losses = {task: pyramid.losses(z[task])[task] for task, pyramid in pyramids.items()}
    criterion = RepMTL(**LAMBDAS)
    total = criterion(losses, {task: Levels(levels) for task, levels in z.items()})
    expected = sum(losses.values())
    for name in SIZES:
        s = [
            torch.autograd.grad(loss, z[task][name], create_graph=True)[0]
            for task, loss in losses.items()
        ]
        expected = expected + 0.9 / 3 * reference.tsr_loss(s) + 0.7 / 3 * reference.csa_loss(s)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"representation\['b'\]: expected the levels of"):
        criterion(losses, {"a": Levels(z["a"]), "b": Levels(*z["b"].values())})
    with pytest.raises(
        ValueError, match=r"representation\['b'\]: expected the levels .* one Tensor"
    ):
        criterion(losses, {"a": Levels(z["a"]), "b": z["b"]["p3"]})


@pytest.mark.parametrize("start", (0, 5))
def test_a_plain_list_of_shared_representations_is_refused(pyramid: Pyramid, start: int) -> None:
    z, losses = batch(pyramid)
    same = [nn.functional.interpolate(level, (3, 3)).mean(1, keepdim=True) for level in z.values()]
    losses_of_same = [sum((x * (t + 1)).tanh().square().mean() for x in same) for t in range(3)]
    for task_losses in (list(losses.values()), losses_of_same):
        levels = same if task_losses is losses_of_same else list(z.values())
        with pytest.raises(ValueError, match=r"losses\[0\]: .* representation\[1\] too.*Levels"):
            RepMTL(start=start)(task_losses, levels)
    with pytest.raises(ValueError, match=r"representation: expected 2, .* got 3.*Levels\(...\)"):
        RepMTL()(list(losses.values())[:2], list(z.values()))
    with pytest.raises(ValueError, match=r"representation: expected the keys of losses.*Levels"):
        RepMTL()(losses, z)


def test_multi_input_representations_may_depend_on_each_other() -> None:
    """In deep supervision, a task's representation is made from another task's."""
    torch.manual_seed(0)
    first = torch.randn(BATCH, 4, 5, requires_grad=True) * 1
    second = first.sin()
    losses = [(first**3).mean(), second.square().mean()]
    assert RepMTL()(losses, [first, second]).isfinite()
    with pytest.raises(ValueError, match=r"losses\[1\]: .* depends on representation\[0\] too"):
        RepMTL()([losses[0], losses[1] + first.square().mean()], [first, second])


def test_bad_levels_of_a_criterion(pyramid: Pyramid) -> None:
    z, losses = batch(pyramid)
    criterion = RepMTL()
    for name, bad, message in (
        ("p4", z["p4"].detach(), r"representation\['p4'\]: expected a tensor with requires_grad"),
        ("p4", z["p4"].float(), r"representation\['p4'\]: expected the dtype"),
        ("p5", z["p5"][:2], r"representation\['p5'\]: expected the batch of .*, 4; got 2"),
        ("p3", z["p3"][:, :, :0], r"representation\['p3'\]|every dimension must be at least 1"),
    ):
        with_bad = {t: loss + bad.sum() for t, loss in losses.items()}
        with pytest.raises(ValueError, match=message):
            criterion(with_bad, Levels(z | {name: bad}))
    for bad, error, message in (
        (torch.ones(BATCH, 6, 5, dtype=torch.bool), TypeError, "positions: expected a list, tuple"),
        ([None, None], ValueError, "positions: expected 3, one for each level; got 2"),
        ({"p3": None}, ValueError, "positions: expected the names of the levels"),
        ([None, 3, None], TypeError, r"positions\[1\]: expected a bool Tensor"),
    ):
        with pytest.raises(error, match=message):
            criterion(losses, Levels(z), positions=bad)
    with pytest.raises(ValueError, match=r"losses\['b'\]: does not depend on any of .*'p3'.*'p5'"):
        criterion(losses | {"b": pyramid.heads["b"]["p3"].weight.sum()}, Levels(z))


def test_check_gives_heads_the_levels(pyramid: Pyramid) -> None:
    z = Levels(pyramid.levels(pyramid.images()))
    seen = []

    def head(levels):
        seen.append(levels)
        return [layer(levels[name]).tanh() for name, layer in pyramid.heads["a"].items()]

    RepMTL.check({"a": head, "b": lambda levels: levels[0].square().mean()}, z)
    assert all(isinstance(levels, Levels) and levels.names == z.names for levels in seen)
    with pytest.raises(SecondDerivativeError, match=r"heads\['b'\]: .*[Cc]dist|has no derivative"):
        RepMTL.check({"b": lambda levels: no_second_derivative(levels["p4"])}, z)
    with pytest.raises(SecondDerivativeError, match="written in place"):
        RepMTL.check([lambda levels: levels["p4"].mul_(2).sum() + levels["p3"].sum()], z)
    with pytest.raises(TypeError, match=r"z\['p3'\]: expected a floating-point"):
        RepMTL.check([head], Levels(p3=torch.ones(2, 3, dtype=torch.int64)))


def no_second_derivative(x: Tensor) -> Tensor:
    return nn.functional.multi_margin_loss(
        x.flatten(1), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    )


def test_check_warns_of_levels_without_means() -> None:
    z = Levels(tokens=torch.randn(2, 5, 6), pooled=torch.randn(2, 6))
    norm = nn.LayerNorm(6)
    with pytest.warns(UserWarning, match="means over the channels are zero"):
        RepMTL.check(
            [lambda levels: norm(levels["tokens"]).tanh().sum() + levels["pooled"].sin().sum()],
            z,
            channel_dim=-1,
        )


def test_the_first_call_names_task_and_levels(pyramid: Pyramid) -> None:
    z, losses = batch(pyramid)
    losses["b"] = losses["b"] + no_second_derivative(z["p4"])
    with pytest.raises(SecondDerivativeError, match=r"losses\['b'\]: .*\['p3'\] or .*\['p4'\]"):
        RepMTL(start=3)(losses, Levels(z))
