"""The tables of tiles: complete, and any of theirs gives the same losses."""

from __future__ import annotations

import itertools
import json
from importlib.util import find_spec

import pytest
import torch
from cases import DEVICE, Case

from repmtl_kernels import reference, rep_mtl_loss

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from repmtl_kernels._ground.saliency import canonical_tasks
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.triton import tiles
from repmtl_kernels.backends.triton.tiles import ANY, KINDS, Rule, Sweep, Tile

ALL = ("16-bit", "ieee")


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Makes REPMTL_TILES name a file with this content."""

    def write(content: str) -> str:
        path = tmp_path / "tiles.json"
        path.write_text(content)
        monkeypatch.setenv(tiles.VARIABLE, str(path))
        _forget()
        return str(path)

    yield write
    _forget()


def _forget():
    tiles.own_rules.cache_clear()
    tiles._find.cache_clear()


def test_there_is_a_tile_for_everything():
    sizes = [1, 16, 17, 32, 33, 49, 64, 65, 600, 601, 1728, 1 << 20]
    for kernel, kind, odd, capability in itertools.product(
        tiles.KERNELS, KINDS, (False, True), (0, 80, 90, 100, 120)
    ):
        for rows, depth in itertools.product(sizes, sizes):
            tile = tiles._find(kernel, kind, odd, rows, depth, capability)
            assert isinstance(tile, tiles.KERNELS[kernel])


def test_no_rule_of_the_package_is_hidden_by_those_before_it():
    first = {
        next(rule for rule in tiles.RULES if rule.kernel == kernel and rule.fits(*operand))
        for kernel, *operand in itertools.product(
            tiles.KERNELS, KINDS, (False, True), (1, 20, 50, 100, 1000), (2048,), (80, 90)
        )
    }
    assert first == set(tiles.RULES)


# Tiles and their strips that divide the sizes and that don't, odd and even in number.
WIDE = [Tile(16, 32, 16, 4, 2), Tile(16, 64, 32, 4, 2), Tile(32, 64, 16, 8, 1)]


@pytest.mark.parametrize("tile", WIDE, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 36, (4, 8)),
        Case(3, 2, 67, (7, 9)),
        Case(2, 2, 88, (6, 14)),
        Case(2, 2, 40, (7, 9), "channels_last"),  # C side: square tiles
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_tiles_give_the_same_losses(own_table, tile: Tile, case: Case, dtype):
    saliencies = case.make(torch.bfloat16)
    exact = [s.detach().double().requires_grad_() for s in saliencies]
    expected = reference.csa_loss(exact) * 0.3 + reference.tsr_loss(exact) * 0.7
    expected_grads = torch.autograd.grad(expected, exact)

    values = [s.detach().to(dtype).requires_grad_() for s in saliencies]
    usual = rep_mtl_loss(values, lambda_tsr=0.7, lambda_csa=0.3, backend="triton").total
    usual_grads = torch.autograd.grad(usual, values)

    rules = [
        Rule("gram", ALL, tile),
        Rule("gradient", ALL, Tile(32, 16, 16, 4, 2)),
        Rule("pull", ALL, Tile(32, 16, 32, 4, 1)),
        Rule("statistics", ALL, Sweep(2, 4, 64, 2, whole=1)),
    ]
    own_table(tiles.as_json(rules))
    own = rep_mtl_loss(values, lambda_tsr=0.7, lambda_csa=0.3, backend="triton").total
    own_grads = torch.autograd.grad(own, values)
    if dtype == torch.float32:  # the table was read: sums in another order are not the same bits
        assert any(not torch.equal(a, b) for a, b in zip(own_grads, usual_grads, strict=True))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert abs(own.double() - expected) <= tolerance * abs(expected)
    for own_grad, grad in zip(own_grads, expected_grads, strict=True):
        assert (own_grad.double() - grad).norm() <= tolerance * grad.norm()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 150, (7, 7)),
        Case(3, 2, 70, (9, 11), "channels_last"),
        Case(9, 2, 40, (), "stacked"),
        Case(3, 3, 33, (4, 5), "mixed"),
    ],
    ids=str,
)
def test_statistics_of_parts_are_those_of_whole_samples(case: Case, masked: bool, monkeypatch):
    """A sample in one program, or in many whose sums a second kernel adds."""
    from repmtl_kernels.backends.triton import statistics

    launched = []
    launch = statistics.launch
    monkeypatch.setattr(
        statistics, "launch", lambda kernel, *a, **k: (launched.append(k), launch(kernel, *a, **k))
    )
    tensors = [t.detach() for t in case.make(torch.bfloat16)]
    views = canonical_tasks(tensors, case.layout == "stacked", case.channel_dim)
    mask = torch.rand(case.batch, views[0][0, 0].numel(), device=DEVICE) < 0.6 if masked else None
    options = {"positions": True, "channels": True, "mask": mask}
    whole = statistics.statistics(views, **options)
    assert all(keywords["WHOLE"] for keywords in launched)
    launches = len(launched)
    with tiles.trying({"statistics": Sweep(2, 4, 8, 1, whole=1)}):
        parts = statistics.statistics(views, **options)
    assert len(launched) == 3 * launches
    exact = choice.load("eager").statistics([v.double() for v in views], **options)
    for of_whole, of_parts, expected in zip(whole, parts, exact, strict=True):
        for result in (of_whole, of_parts):
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.scale, parts.scale)


def test_a_table_survives_writing_and_reading(own_table):
    rules = (
        Rule("gram", ("16-bit",), Tile(128, 256, 64, 8, 3), False, (601, ANY), capability=(90, 90)),
        Rule("statistics", ALL, Sweep(4, 264, 1024, 8, 64), depth=(49, 49)),
    )
    own_table(tiles.as_json(rules))
    assert tiles.own_rules() == rules
    assert tiles._find("gram", "16-bit", False, 1728, 2048, 90) == rules[0].tile
    for kind, odd, rows, capability in (
        ("tf32", False, 1728, 90),
        ("16-bit", True, 1728, 90),
        ("16-bit", False, 600, 90),
        ("16-bit", False, 1728, 100),
    ):
        tile = tiles._find("gram", kind, odd, rows, 2048, capability)
        assert tile in [rule.tile for rule in tiles.RULES]


GOOD = {"kernel": "gram", "kinds": ["ieee"], "tile": Tile(64, 64, 16, 4, 3)._asdict()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"row": [1, 2], "capabilty": [90, 90]},
            r"no keys but those of Rule; got \['capabilty', 'row",
        ),
        ({"kernel": "grim"}, "kernel: expected one of gram, gradient, pull, statistics; got 'grim"),
        ({"kinds": ["bf16"]}, "kinds: expected some of 16-bit, tf32"),
        ({"kinds": []}, "kinds: expected some of"),
        ({"odd": 3}, "odd: expected true, false or null; got 3"),
        ({"rows": [9, 8]}, r"rows: expected \[least, most\]; got \(9, 8\)"),
        ({"tile": {**GOOD["tile"], "depth": 24}}, "tile.depth: expected a power of two"),
        ({"tile": {**GOOD["tile"], "columns": 32}}, "tile.columns: expected a multiple of 64"),
        ({"tile": {**GOOD["tile"], "registers": 300}}, "tile.registers: expected null or a number"),
        ({"tile": {"rows": 64}}, "missing .* required"),
    ],
)
def test_a_bad_table_is_refused(own_table, change: dict, message: str):
    own_table(json.dumps({"rules": [{**GOOD, **change}]}))
    with pytest.raises(ValueError, match=message) as error:
        tiles.own_rules()
    assert str(error.value).startswith("REPMTL_TILES: expected a JSON file of tiles")
    with pytest.raises(ValueError, match="REPMTL_TILES"):
        saliencies = torch.ones(2, 2, 16, 20, device=DEVICE)
        rep_mtl_loss(saliencies, backend="triton")


def test_a_table_that_is_not_there_is_refused(own_table, tmp_path):
    own_table("{}")
    with pytest.raises(ValueError, match="KeyError: 'rules'"):
        tiles.own_rules()
    (tmp_path / "tiles.json").unlink()
    _forget()
    with pytest.raises(ValueError, match="FileNotFoundError"):
        tiles.own_rules()
