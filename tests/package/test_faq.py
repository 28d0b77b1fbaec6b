"""Each error and warning that docs/faq.md quotes is what a user gets."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repmtl_kernels import RepMTL, SaliencyMonitor

FAQ = (Path(__file__).resolve().parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")
CASES: dict[str, tuple] = {}


class Problem:
    """An encoder, two heads, and their losses on one batch."""

    def __init__(self, batch: int = 4) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(batch, 3, 8, 8)
        self.labels, self.depth = torch.randint(4, (batch, 8, 8)), torch.rand(batch, 1, 8, 8)
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.heads = {"a": nn.Conv2d(8, 4, 1), "b": nn.Conv2d(8, 1, 1)}

    def losses(self, z: Tensor) -> dict[str, Tensor]:
        return self.losses_of(self.heads["a"](z), self.heads["b"](z))

    def losses_of(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"a": F.cross_entropy(a, self.labels), "b": F.mse_loss(b, self.depth)}


def case(question: str):
    """Mark the function that does what the question is about."""

    def mark(function):
        CASES[question] = function
        return function

    return mark


@case("My head has no second derivative. What now?")
def _():
    p = Problem()
    RepMTL.check({"a": nn.Sequential(p.heads["a"], nn.Hardsigmoid())}, p.encoder(p.x))


@case("Which Z do I take?")
def _():
    p = Problem()
    z = p.encoder(p.x)
    RepMTL()(p.losses(z), z.clone())


@case("My list of feature maps is refused")
def _():
    p = Problem()
    p3 = p.encoder(p.x)
    p4 = F.avg_pool2d(p3, 2)
    both = (p.heads["a"](p3).mean() - p.heads["a"](p4).mean()).square()
    RepMTL()([both, p.heads["b"](p4).square().mean()], [p3, p4])


@case("My losses are one stacked tensor")
def _():
    p = Problem()
    z = p.encoder(p.x)
    RepMTL()(torch.stack(list(p.losses(z).values())), z)


@case("My last batch has one sample")
def _():
    p = Problem(batch=1)
    z = p.encoder(p.x)
    RepMTL()(p.losses(z), z)


@case("With log losses, my loss is refused")
def _():
    p = Problem()
    z = p.encoder(p.x)
    losses = p.losses(z)
    RepMTL(log_losses=True)(losses | {"b": losses["b"] - losses["b"].detach() - 0.25}, z)


@case("My total is NaN")
def _():
    p = Problem()
    p.depth[0] = torch.nan
    z = p.encoder(p.x)
    losses = p.losses(z)
    off = (p.heads["b"](z) - p.depth).square()
    losses["b"] = torch.where(p.depth.isnan(), 0, off).mean()
    RepMTL()(losses, z)


@case("Why is my weight falling?")
def _():
    p, criterion = Problem(), RepMTL(every=1)
    for _ in range(3):
        z = p.encoder(p.x)
        criterion({task: 1e-6 * loss for task, loss in p.losses(z).items()}, z)


@case("My encoder is frozen")
def _():
    p = Problem()
    with torch.no_grad():
        z = p.encoder(p.x)
    RepMTL()(p.losses(z), z)


@case("My head begins with a LayerNorm, and I get a warning")
def _():
    p = Problem()
    head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))
    RepMTL.check({"a": head}, p.encoder(p.x).flatten(2).mT, channel_dim=-1)


@case("Can I compile encoder and heads together?")
def _():
    p = Problem()

    @torch.compile(backend="aot_eager")
    def network(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = p.encoder(x)
        return z, p.heads["a"](z), p.heads["b"](z)

    z, a, b = network(p.x)
    RepMTL()(p.losses_of(a, b), z)


@case("My validation loop fails under `no_grad`")
@torch.no_grad()
def _():
    p = Problem()
    z = p.encoder(p.x)
    RepMTL()(p.losses(z), z)


@case("My report or figure is refused")
def _():
    p, monitor = Problem(), SaliencyMonitor()
    with torch.no_grad():
        z = p.encoder(p.x)
        monitor(p.losses(z), z)
    monitor.report(os.devnull)


def quoted() -> dict[str, str]:
    """Return what each section of the page quotes, in one line."""
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", FAQ, re.M | re.S)
    blocks = (
        (title, re.search(r"^```text\n(.*?)^```", text, re.M | re.S)) for title, text in sections
    )
    return {title: " ".join(block[1].split()) for title, block in blocks if block}


def test_every_quotation_has_a_case():
    assert quoted().keys() == CASES.keys()


@pytest.mark.parametrize("question", CASES)
@pytest.mark.filterwarnings("default")
def test_quotation(question: str):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            CASES[question]()
        except Exception as error:  # noqa: BLE001 -- the page names its type
            said = [error]
        else:
            said = [warning.message for warning in caught]
    messages = [f"{type(what).__name__}: {what}" for what in said]
    parts = quoted()[question].split(" ... ")
    assert any(all(part in message for part in parts) for message in messages), messages


def test_answers_without_an_error():
    """As the page says, with a frozen encoder, one sample, a penalty, None and a ratio of 0."""
    p = Problem()
    with torch.no_grad():
        z = p.encoder(p.x)
    z.requires_grad_()
    criterion = RepMTL()
    criterion(p.losses(z), z).backward()
    assert criterion.last.applied and p.heads["a"].weight.grad.any()
    z = p.encoder(p.x)
    criterion(p.losses(z), z)
    assert criterion.last.tsr is None and criterion.last.ratio is None

    one = Problem(batch=1)
    z = one.encoder(one.x)
    alone = RepMTL(lambda_csa=0, strength=0.03)
    (alone(one.losses(z), z) + one.heads["a"].weight.square().sum()).backward()
    assert alone.last.applied

    flat = RepMTL(every=1)
    z = p.encoder(p.x)
    flat([head(z).abs().mean() for head in p.heads.values()], z)
    mix = (flat.last.tsr + flat.last.csa) / 2
    assert flat.last.ratio == 0
    torch.testing.assert_close(flat.last.regularizer / mix, torch.tensor(0.03))
