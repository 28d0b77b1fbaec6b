"""The step of LibMTL's weightings, on a stand-in for its checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from stand_ins import CPU, HEAD, new_run
from test_steps_part import SMALL_NETWORK, SMALL_OFFICE, watched_work

from benchmarks import libmtl, methods
from benchmarks.parts import libmtl as part
from benchmarks.parts import steps

ARCHITECTURE = """
from torch import nn

class HPS(nn.Module):
    def __init__(self, task_name, encoder_class, decoders, rep_grad, multi_input, device):
        super().__init__()
        assert rep_grad is False
        self.task_name, self.decoders, self.device = task_name, decoders, device
        self.encoder = encoder_class()

    def forward(self, inputs, task_name=None):
        z = self.encoder(inputs)
        return {t: self.decoders[t](z) for t in self.task_name if task_name in (None, t)}
"""
WEIGHTING = """
import numpy as np
from torch import nn

class EW(nn.Module):
    def init_param(self):
        pass

    def backward(self, losses, scale):
        (scale * losses.sum()).backward()
        return np.ones(len(losses))

class FairGrad(EW): pass
class Nash_MTL(EW): pass
"""
CONFIG = """
import argparse
LibMTL_args = argparse.ArgumentParser()
LibMTL_args.add_argument("--weighting")
LibMTL_args.add_argument("--scale", type=float, default=1.0)

def prepare_args(params):
    print("settings")
    return {"weight_args": {"scale": params.scale}}, {}, None
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    files = {"architecture/__init__": ARCHITECTURE, "weighting/__init__": WEIGHTING}
    # The package's own __init__ needs more than is installed.
    files |= {"weighting/abstract_weighting": "", "config": CONFIG, "__init__": "import nothing"}
    for name, text in files.items():
        path = tmp_path / "LibMTL" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(libmtl, "PACKAGES", ("torch",))
    others = {name: module for name, module in sys.modules.items() if name.startswith("LibMTL")}
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("LibMTL")]:
        del sys.modules[name]
    sys.modules.update(others)


def test_the_checkout_has_to_be_libmtls(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a checkout of LibMTL, .* got /"):
        libmtl.imported(tmp_path)


def test_what_is_not_installed_is_named(checkout, monkeypatch):
    monkeypatch.setattr(libmtl, "PACKAGES", ("torch", "ecos_of_tomorrow"))
    with pytest.raises(ModuleNotFoundError, match="not installed: ecos_of_tomorrow"):
        libmtl.imported(checkout)


@pytest.mark.parametrize("network", [SMALL_NETWORK, SMALL_OFFICE], ids=lambda n: n.name)
def test_its_step_is_a_step_of_the_same_model(checkout, network, monkeypatch, capsys):
    libmtl.imported(checkout)
    work, seen = watched_work(network, monkeypatch)
    method = libmtl.OfLibmtl("EW")
    for each in (methods.EqualWeighting(), method, method):
        torch.manual_seed(1)  # dropout
        work.cycle(each)
    assert seen[0].norm() > 0
    for mine in seen[1:]:
        torch.testing.assert_close(mine, seen[0], rtol=1e-4, atol=1e-5)
    assert work.phases(method) == {}
    assert capsys.readouterr().out == ""


def test_a_solver_that_fails_is_no_weighting(checkout):
    libmtl.imported(checkout)
    work = methods.Work(SMALL_OFFICE, torch.float32, CPU)
    with pytest.raises(RuntimeError, match="Nash_MTL: its solver ECOS found no weights"):
        work.cycle(libmtl.OfLibmtl("Nash_MTL"))


def test_the_run_has_a_row_for_every_method(checkout, monkeypatch):
    pytest.importorskip("torchjd")
    libmtl.imported(checkout)
    monkeypatch.setattr(libmtl, "NETWORKS", [SMALL_OFFICE])
    for name in ("MIN_ROUNDS", "MAX_ROUNDS", "PHASE_CYCLES"):
        monkeypatch.setattr(steps, name, 1)
    run = new_run("libmtl")
    libmtl.measure(run, checkout)
    assert {row["method"] for row in run.rows} == set(part.ROWS)
    assert [r["method"] for r in run.rows if r["error"]] == ["libmtl_Nash_MTL"]
    assert run.more == {
        "libmtl_commit": "unknown",
        "settings": {key: {"scale": 1.0} for key in ("Nash_MTL", "FairGrad", "EW")},
    }


def test_the_table_has_the_papers_figures_beside_the_measured_ones():
    common = {"network": "nyuv2", "dtype": "float32", "architecture": "a network", "error": None}
    ratios = {"equal_weighting": 1.0, "rep_mtl_default": 1.5, "libmtl_Nash_MTL": 3.0, "nash_mtl": 2}
    rows = [common | {"method": method, "ratio_to_ew": r} for method, r in ratios.items()]
    rows.append(common | {"method": "libmtl_FairGrad", "error": "RuntimeError: no"})
    text = part.table({**HEAD, "libmtl_commit": "0123456789ab", "rows": rows})
    lines = text.splitlines()[2:7]
    assert lines[0] == "| equal weighting | 1.00x |  |"
    assert lines[1].endswith("| 1.50x |  |")
    assert lines[2:] == [
        "| Nash-MTL (LibMTL) | 3.00x, 50 % | 26 % |",
        "| FairGrad (LibMTL) | failed | 12 % |",
        "| Nash-MTL (torchjd) | 2.00x, 25 % |  |",
    ]
