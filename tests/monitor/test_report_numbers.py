"""Conclusions of the report from numbers: intervals, verdicts, trends, loudness."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from made_summaries import made

from repmtl_kernels._monitor.report import findings
from repmtl_kernels._monitor.report.advice import advice, equal_lengths
from repmtl_kernels._monitor.report.findings import Trend, Verdict, estimate, find
from repmtl_kernels._monitor.report.places import (
    _plain_sentence,
    concentration,
    plane,
    regions,
)
from repmtl_kernels._monitor.report.words import in_short, lead


def verdicts(summary) -> dict[tuple[int, int], Verdict]:
    return {pair.rows: pair.verdict for pair in find(summary).pairs}


def sentences(summary) -> list[str]:
    found = find(summary)
    return [lead(found), *(text for finding in in_short(found) for text in finding.sentences)]


@pytest.mark.parametrize("tail", (0.975, 0.995, 0.9995))
@pytest.mark.parametrize("freedom", (1, 2, 3, 4, 6, 12, 19, 50))
def test_quantile_of_student(tail, freedom):
    stats = pytest.importorskip("scipy.stats")
    exact = stats.t.ppf(tail, freedom)
    mine = findings.student_quantile(tail, freedom)
    # The expansion is short where the tail is far out and the degrees of freedom are few.
    tolerance = 1e-9 if freedom <= 2 else 0.25 if freedom < 6 else 0.03
    assert mine == pytest.approx(exact, rel=tolerance)


def test_interval_written_out():
    values = [0.1, 0.3, 0.1, 0.4, 0.2, 0.4]
    found = estimate(values)
    squares = 0.2**2 + 0.2**2 + 0.3**2 + 0.2**2 + 0.2**2
    freedom = 2 * 5**2 / (3 * 6 - 4)  # 3.57
    assert found.mean == pytest.approx(sum(values) / 6) and found.observations == 6
    quantile = findings.student_quantile(0.975, freedom)
    assert found.half == pytest.approx(quantile * math.sqrt(squares / 10) / math.sqrt(6))
    wider = findings.student_quantile(1 - 0.025 / 10, freedom) / quantile
    assert estimate(values, comparisons=10).half == pytest.approx(wider * found.half)


def test_a_drift_is_no_noise():
    values = [0.4 - 0.4 * 0.8**k + 0.01 * (-1) ** k for k in range(20)]
    assert estimate(values).half < 0.04
    assert estimate([0.3] * 20).half == 0


@pytest.mark.parametrize("number", (5, 10, 20))
def test_interval_of_noise_holds_its_mean(number):
    noise = torch.randn(4000, number, generator=torch.Generator().manual_seed(0)).tolist()
    held = sum(not estimate(run).excludes_zero for run in noise) / len(noise)
    assert 0.94 < held < 0.985  # with few values it is wider than it has to be


def test_few_values_have_no_interval():
    assert math.isnan(estimate([]).mean) and estimate([]).observations == 0
    for values in ([0.5], [0.5, 0.5]):
        assert estimate(values).mean == 0.5 and not estimate(values).excludes_zero


def test_verdicts_are_the_relations_that_were_made():
    assert verdicts(made(unseen=(2, 3))) == {
        (0, 1): Verdict.HELP_MUCH,
        (1, 3): Verdict.CONFLICT_MUCH,
        (0, 3): Verdict.CONFLICT,
        (0, 2): Verdict.UNCLEAR,
        (1, 2): Verdict.UNRELATED,
        (2, 3): Verdict.UNSEEN,
    }
    assert set(verdicts(made(count=4)).values()) == {Verdict.FEW}


def test_a_turn_has_its_step():
    (pair,) = (pair for pair in find(made()).pairs if pair.rows == (0, 3))
    assert pair.trend is Trend.TURNED
    assert abs(pair.since - 30 * 50) <= 100
    others = {pair.trend for pair in find(made()).pairs if pair.rows in ((0, 1), (1, 3))}
    assert others == {Trend.STEADY}
    assert {pair.trend for pair in find(made(count=14)).pairs} == {Trend.SHORT}


def test_a_trend_away_from_zero_grows():
    summary = made()
    cosine = summary.history.cosine.clone()
    cosine[:, 0, 1] = torch.linspace(0.1, 0.6, 60) + 0.01 * (-1.0) ** torch.arange(60)
    for values, expected in ((cosine, Trend.STRONGER), (cosine.flip(0), Trend.WEAKER)):
        changed = replace(summary, history=replace(summary.history, cosine=values))
        (pair,) = (pair for pair in find(changed).pairs if pair.rows == (0, 1))
        assert pair.trend is expected


def test_loud_and_drowned_tasks():
    found = find(made()).loudness
    assert [one.loud for one in found] == [False, True, False, False]
    assert found[1].times == pytest.approx(7)  # 0.7 against 0.1 on average
    assert [one.quiet for one in found] == [True, False, True, True]  # 0.1 against 0.3
    assert not any(one.loud or one.quiet for one in find(made(count=4)).loudness)


def test_weights_make_lengths_equal():
    weights = equal_lengths([0.7, 0.2, 0.1, math.nan])
    assert [w * s for w, s in zip(weights, (0.7, 0.2, 0.1), strict=False)] == pytest.approx(
        [weights[0] * 0.7] * 3
    )
    assert sum(weights[:3]) == pytest.approx(3) and math.isnan(weights[3])


def test_sentences_say_what_is_noise():
    text = "\n".join(sentences(made(unseen=(2, 3))))
    assert "<b>depth</b> and <b>edges</b> conflict." in text
    assert "<b>segmentation</b> and <b>edges</b> conflict a little." in text
    assert "<b>segmentation</b> and <b>depth</b> help each other." in text
    assert "is 0.40 ± 0.04, and they agree in 70 % of the samples." in text
    assert "<b>segmentation</b> and <b>edges</b> conflict since about step 1," in text
    assert "<b>depth</b> is loud. Its gradient is 7.0 times as long" in text
    assert "<b>segmentation</b> and <b>normals</b>: no clear direction." in text
    assert text.startswith(
        "Of 6 pairs of tasks, 2 conflict, 1 helps, 1 is unrelated, 1 has no clear direction and 1 "
        "was never seen together. <b>depth</b> drowns the other tasks.\n"
    )
    assert "hints" not in text


def test_early_numbers_are_hints():
    text = "\n".join(sentences(made(count=3)))
    assert "The numbers are from 3 observations. They are hints, no more." in text
    assert text.startswith("All 6 pairs of tasks have too few observations.")
    assert "conflict." not in text and "help each other" not in text and "loud" not in text
    (piece,) = advice(find(made(count=3)))
    assert "Observe longer" in piece


def test_one_pair_and_drowned_tasks():
    assert sentences(made(("a", "b")))[0] == "The pair of tasks helps."
    summary = made()
    share = torch.tensor([0.4, 0.3, 0.25, 0.05], dtype=torch.float64)
    text = "\n".join(sentences(replace(summary, norm_share=share)))
    assert "<b>edges</b> is hardly heard. Its gradient has 16 % of the average length" in text
    assert "loud" not in text
    assert "hardly heard" not in "\n".join(sentences(summary)), "one loud task says it all"


def test_a_task_beside_others_without_gradients():
    """As where the labels of all other tasks are ignored."""
    summary = made(("a", "b"))
    share = torch.tensor([1, 0], dtype=torch.float64)
    history = replace(summary.history, norm_share=share.expand(60, 2))
    text = "\n".join(sentences(replace(summary, norm_share=share, history=history)))
    assert "<b>a</b> is alone: the other tasks have no gradient at all." in text
    assert "inf" not in text


def test_two_networks_where_tasks_conflict():
    """The tasks that help each other share one, and the two others the second."""
    summary = made()
    text = "\n".join(advice(find(summary)))
    assert "one for segmentation and depth, the other for normals and edges." in text
    assert "score" not in "\n".join(advice(find(made(unseen=(0, 2))))), "no cosine, no groups"
    assert "score" not in "\n".join(advice(find(made(("a", "b"))))), "two tasks have one split"


def test_no_advice_without_a_reason():
    summary = made(("a", "b"))
    flat = torch.full((60, 2), 0.5, dtype=torch.float64)
    calm = replace(
        summary,
        norm_share=flat[0],
        history=replace(summary.history, norm_share=flat, cosine=summary.history.cosine * 0.3),
    )
    assert advice(find(calm)) == ["Nothing here asks for a change."]


def test_regions_and_concentration():
    values = torch.ones(6, 6)
    assert concentration(values) == pytest.approx(4 / 36)  # 3.6 positions are a tenth
    values[:2, 4:] = 4.0
    by_name = {region.name: region.mean for region in regions(values)}
    assert by_name["top right"] == 4 and by_name["centre"] == 1 and len(by_name) == 9
    assert concentration(values) == pytest.approx(16 / (32 + 16))
    values[4:] = math.nan  # padding in all samples
    assert concentration(values) == pytest.approx(8 / (16 + 20))  # 2 of 24 positions
    by_name = {region.name: region.mean for region in regions(values)}
    assert by_name["top right"] == 4 and math.isnan(by_name["bottom left"])
    sequence = regions(plane(torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])))
    assert [(r.name, r.mean) for r in sequence] == [("beginning", 1), ("middle", 2), ("end", 3)]
    volume = plane(torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]))
    assert volume.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_small_maps():
    """Two rows have no middle, and one of four positions is no tenth of them."""
    corner = torch.tensor([[1.0, 1.0], [1.0, 9.0]])
    assert [r.name for r in regions(corner)] == [
        "top left", "top right", "bottom left", "bottom right"
    ]  # fmt: skip
    said = "strongest at the bottom right; one of 4 positions carries 75 % of it"
    assert _plain_sentence(corner) == said
    assert [r.name for r in regions(plane(torch.ones(2)))] == ["beginning", "end"]
    assert [r.name for r in regions(torch.ones(3, 1))] == ["top centre", "centre", "bottom centre"]
    for shape in ((1, 1), (2, 2), (1, 5), (7, 7), (12, 16)):
        assert _plain_sentence(torch.ones(shape)) == "even, no place stands out"
    one_row = torch.tensor([[1.0] * 9 + [11.0]])
    assert "a tenth of the positions carries 55 %" in _plain_sentence(one_row)
