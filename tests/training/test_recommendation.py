"""Networks of recommenders: sparse tables, towers, labels that are missing, one position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repmtl_kernels import RepMTL, csa_loss, task_saliencies

IDS, WIDTH, CHANNELS, BATCH = 40, 4, 8, 64
TASKS = ("click", "like", "finish")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return ids (B, 2) and labels (B, T), the last two missing where there is no click."""
    fields = torch.randint(IDS, (batch, 2), generator=seeded())
    labels = torch.randint(2, (batch, len(TASKS)), generator=seeded(1)).float()
    labels[labels[:, 0] == 0, 1:] = torch.nan
    return fields, labels


class Network(nn.Module):
    """Shared tables and a layer; each tower has a table of its own, as in STEM."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(IDS, WIDTH, sparse=sparse)
        self.layer = nn.Linear(2 * WIDTH, CHANNELS)
        self.own = nn.ModuleDict({t: nn.Embedding(IDS, CHANNELS, sparse=sparse) for t in TASKS})
        self.towers = nn.ModuleDict(
            {t: nn.Sequential(nn.Linear(CHANNELS, 6), nn.SiLU(), nn.Linear(6, 1)) for t in TASKS}
        )

    def forward(self, fields: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = F.silu(self.layer(self.table(fields).flatten(1)))
        items = fields[:, 1]
        return z, {t: self.towers[t](z * self.own[t](items)).flatten() for t in TASKS}


def network(sparse: bool = False) -> Network:
    torch.manual_seed(0)
    return Network(sparse)


def losses_of(logits: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    known = ~labels.isnan()
    return {
        task: F.binary_cross_entropy_with_logits(logit[known[:, t]], labels[known[:, t], t])
        for t, (task, logit) in enumerate(logits.items())
    }


def gradients(model: Network, criterion: RepMTL, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the gradients of one step, under autocast to ``dtype`` if there is one."""
    fields, labels = rows()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        z, logits = model(fields)
        total = criterion(losses_of(logits, labels), z, ~labels.isnan().T)
    total.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_sparse_tables_have_the_gradients_of_dense_ones():
    dense = gradients(network(), RepMTL(0.5, 0.5))
    sparse = gradients(network(sparse=True), RepMTL(0.5, 0.5))
    assert sum(gradient.is_sparse for gradient in sparse) == 1 + len(TASKS)
    for one, other in zip(dense, sparse, strict=True):
        torch.testing.assert_close(other.to_dense(), one)


def test_csa_under_bfloat16_autocast_is_near_float32():
    """TSR is not: single samples whose means over the channels are near 0 rule its gradient."""
    exact, rounded = RepMTL(0.0, 0.5), RepMTL(0.0, 0.5)
    in_float32 = gradients(network(), exact)
    in_bfloat16 = gradients(network(), rounded, torch.bfloat16)
    torch.testing.assert_close(rounded.last.csa, exact.last.csa, rtol=0.01, atol=0)
    for one, other in zip(in_float32, in_bfloat16, strict=True):
        assert other.dtype == torch.float32
        assert (other - one).norm() < 0.05 * one.norm()


def masked_means(logits: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Return the losses as docs/recommendation.md has them, without an index."""
    present, filled, losses = ~labels.isnan(), labels.nan_to_num(), {}
    for t, (task, logit) in enumerate(logits.items()):
        each = F.binary_cross_entropy_with_logits(logit, filled[:, t], reduction="none")
        losses[task] = torch.where(present[:, t], each, 0).sum() / present[:, t].sum()
    return losses


def test_a_masked_mean_has_the_saliencies_of_the_labelled_samples():
    fields, labels = rows()
    results = []
    for losses in (losses_of, masked_means):
        model = network()
        z, logits = model(fields)
        total = RepMTL(0.5, 0.5)(losses(logits, labels), z, ~labels.isnan().T)
        total.backward()
        results.append((total.detach(), model.table.weight.grad))
    torch.testing.assert_close(*results)


def test_a_missing_label_that_reaches_the_loss_is_seen():
    """torch.where hides a NaN from the value, not from the saliencies: the total is NaN."""
    fields, labels = rows()
    z, logits = network()(fields)
    each = F.binary_cross_entropy_with_logits(logits["like"], labels[:, 1], reduction="none")
    hidden = torch.where(labels[:, 1].isnan(), 0, each).mean()
    assert hidden.isfinite()
    criterion = RepMTL(0.5, 0.5)
    with pytest.warns(UserWarning, match=r"^losses\['like'\]: finite, but its gradient"):
        total = criterion({**losses_of(logits, labels), "like": hidden}, z, ~labels.isnan().T)
    assert total.isnan()


def test_a_product_of_two_towers_is_a_task():
    """The probability of click and like, as in ESMM: the loss of "like" trains both towers."""
    fields, labels = rows()
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        z, logits = model(fields)
        click, like = (logits[task].float().sigmoid() for task in ("click", "like"))
        losses = {
            "click": F.binary_cross_entropy(click, labels[:, 0]),
            "click and like": F.binary_cross_entropy(click * like, labels[:, 1].nan_to_num()),
        }
        criterion = RepMTL(0.5, 0.5)
        total = criterion(losses, z)
    total.backward()
    assert criterion.last.csa.isfinite()
    for task in ("click", "like"):
        assert model.towers[task][0].weight.grad.norm() > 0


def test_one_position_is_a_tensor_without_positions():
    """TSR over the positions is 0 there, whatever the saliencies are."""
    fields, labels = rows()
    z, logits = network()(fields)
    losses = losses_of(logits, labels)
    criterion = RepMTL(0.5, 0.5, over="space")
    with pytest.warns(UserWarning, match="^over: 'space' .* the representation has one"):
        criterion(losses, z)
    assert criterion.last.tsr == 0
    criterion = RepMTL(0.5, 0.5)
    criterion(losses, z)
    flat = criterion.last
    with_one = [s.unsqueeze(-1) for s in task_saliencies(losses, z)]
    assert flat.tsr > 0
    torch.testing.assert_close(flat.csa, csa_loss(with_one).detach())


def test_experts_are_positions():
    """MMoE: the last tensor that all towers read is the stack of the experts, (B, experts, C)."""
    fields, labels = rows()
    torch.manual_seed(0)
    table, experts = nn.Embedding(IDS, WIDTH), nn.Linear(2 * WIDTH, 3 * CHANNELS)
    gates = nn.ModuleDict({t: nn.Linear(2 * WIDTH, 3) for t in TASKS})
    towers = nn.ModuleDict({t: nn.Linear(CHANNELS, 1) for t in TASKS})
    x = table(fields).flatten(1)
    z = F.silu(experts(x)).unflatten(1, (3, CHANNELS))
    mixed = {t: (gates[t](x).softmax(1)[:, :, None] * z).sum(1) for t in TASKS}
    losses = losses_of({t: towers[t](mixed[t]).flatten() for t in TASKS}, labels)
    criterion = RepMTL(0.5, 0.5, channel_dim=-1)
    criterion(losses, z, ~labels.isnan().T).backward()
    assert criterion.last.tsr > 0
    assert all(gate.weight.grad.norm() > 0 for gate in gates.values())


def test_csa_of_a_large_batch_in_bfloat16():
    """Saliencies of a mean loss over thousands of samples are tiny: here of order 1e-6."""
    batch = 4096
    saliencies = [
        (1e-6 * torch.randn(batch, 8, generator=seeded(t))).bfloat16() for t in range(len(TASKS))
    ]
    present = torch.rand(len(TASKS), batch, generator=seeded(9)) < 0.5
    present[0] = True
    exact = csa_loss([s.double() for s in saliencies], present=present, backend="reference")
    value = csa_loss(saliencies, present=present)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
