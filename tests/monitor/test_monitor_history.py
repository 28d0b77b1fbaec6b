"""Running means, and the history of single observations."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from cases import DEVICE
from literal_monitor import FIELDS, literal, losses_with
from torch import Tensor

from repmtl_kernels import SaliencyMonitor


def saliencies(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    return list((values + values[:1]).to(DEVICE))


def watch(monitor: SaliencyMonitor, seed: int, absent: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Observe random saliencies; return the values of this observation."""
    level = [None if t in absent else s for t, s in enumerate(saliencies(seed))]
    z = torch.zeros(4, 5, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    monitor(losses_with([level], [z]), z)
    return literal([level])


def mean_of(observations: list[Tensor], decay: float) -> Tensor:
    """Return the running means element by element, from their definition."""
    result = torch.full_like(observations[0], math.nan)
    for place in range(result.numel()):
        seen = [o.flatten()[place].item() for o in observations]
        seen = [value for value in seen if math.isfinite(value)]
        weights = [decay ** (len(seen) - 1 - i) for i in range(len(seen))]
        if seen:
            total = sum(w * v for w, v in zip(weights, seen, strict=True))
            result.view(-1)[place] = total / sum(weights)
    return result


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_means_are_exponential_and_without_bias(decay: float) -> None:
    """A task that is absent keeps its means, and starts when it comes."""
    monitor = SaliencyMonitor(every=1, decay=decay)
    absent = [(1,), (), (0,), (), (1, 2), ()]
    observed = []
    for i, without in enumerate(absent):
        before = monitor.summary()
        observed.append(watch(monitor, i, without))
        summary = monitor.summary()
        for name in FIELDS:
            expected = mean_of([values[name] for values in observed], decay)
            got = getattr(summary, name)
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
            history = getattr(summary.history, name)
            expected = torch.stack([values[name] for values in observed])
            torch.testing.assert_close(history, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
            if i:
                for t in without:
                    kept = getattr(before, name)[t]
                    torch.testing.assert_close(got[t], kept, rtol=1e-15, atol=0, equal_nan=True)
        expected = mean_of([values["maps/0"] for values in observed], decay)
        torch.testing.assert_close(
            summary.maps[""], expected, rtol=1e-11, atol=1e-11, equal_nan=True
        )
    assert summary.observations == len(absent)


@pytest.mark.parametrize("keep", [2, 3, 5, 8])
def test_history_is_bounded_and_evenly_thinned(keep: int) -> None:
    monitor, all_of_them = SaliencyMonitor(every=1, keep=keep), SaliencyMonitor(every=1)
    for i in range(40):
        watch(monitor, i % 5)
        watch(all_of_them, i % 5)
        history, complete = monitor.summary().history, all_of_them.summary().history
        steps = history.steps.tolist()
        assert complete.steps.tolist() == [*range(i + 1)]
        assert min(keep, i + 1) / 2 <= len(steps) <= keep
        assert steps[0] == 0 and steps[-1] == i
        gaps = {b - a for a, b in pairwise(steps[:-1])}
        assert len(gaps) <= 1 and all(math.log2(gap).is_integer() for gap in gaps)
        for name in (*FIELDS, "ratio"):
            kept = getattr(complete, name)[steps]
            assert torch.equal(getattr(history, name).nan_to_num(7), kept.nan_to_num(7))
    # The means are of all observations, whatever is kept.
    assert torch.equal(monitor.summary().cosine, all_of_them.summary().cosine)


@pytest.mark.parametrize("names", [None, ("a", "b")])
def test_summary_before_the_first_observation(names: tuple[str, ...] | None) -> None:
    summary = SaliencyMonitor(names=names).summary()
    count = 0 if names is None else 2
    assert summary.tasks == (names or ()) and summary.observations == 0 and summary.step == -1
    assert summary.cosine.shape == (count, count) and summary.cosine.isnan().all()
    assert summary.tsr.shape == (count,) and math.isnan(summary.ratio) and summary.maps == {}
    assert summary.history.cosine.shape == (0, count, count)
    assert summary.history.csa.shape == (0, count) and summary.history.ratio.shape == (0,)
    assert summary.history.steps.dtype == torch.int64 and len(summary.history.steps) == 0


def test_repr_is_short() -> None:
    monitor = SaliencyMonitor(every=1)
    for number in range(3):
        watch(monitor, number)
    text = repr(monitor.summary())
    assert "cosine=" in text and "history" not in text and "maps" not in text


def test_summary_is_a_copy() -> None:
    monitor = SaliencyMonitor(every=1)
    watch(monitor, 0)
    first = monitor.summary()
    copies = {name: getattr(first, name).clone() for name in FIELDS}
    first.cosine.fill_(3)
    watch(monitor, 1)
    assert all(torch.equal(getattr(first, name), copies[name]) for name in FIELDS[1:])
    assert monitor.summary().cosine.max() < 1.1


def test_names() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    losses = {"depth": z.square().sum(), 7: z.sin().sum()}
    monitor, named = SaliencyMonitor(every=1), SaliencyMonitor(names=["a", "b"])
    for m in (monitor, named):
        m(losses, z)
    assert monitor.summary().tasks == ("depth", "7") and named.summary().tasks == ("a", "b")
    cosine = monitor.summary().cosine.clone()
    # Another order, and a task that is left out, are found by their keys.
    monitor(dict(reversed(losses.items())), z)
    monitor({7: losses[7]}, z)
    torch.testing.assert_close(monitor.summary().cosine, cosine)
    assert monitor.summary().history.csa[2].isnan().tolist() == [True, False]
