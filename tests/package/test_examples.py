"""The examples run with the commands in their first lines, in a terminal, and networks learn."""

import ast
import os
import pty
import re
import select
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LIBMTL = "libmtl_checkout.py"
# A folder with a checkout of LibMTL, which needs torch_geometric.
CHECKOUT = "REPMTL_LIBMTL"
STAND_IN = ROOT / "tests" / "integrations" / "libmtl_stand_in"
ON_RANKS = ("data_parallel.py", "sharded_encoder.py")
# Several examples share these modules. They are no programs.
HELPERS = {"digits.py", "interactions.py", "scenes.py", "sentences.py"}

# Script and options, the libraries that it needs, its last figure, and the bound that a trained
# model meets.
PROGRAMS = [
    ("plain_loop.py", (), r"held out: ([\d.]+)% of the pixels right", lambda share: share > 90),
    ("torchjd_aggregator.py", ("torchjd",), r"total ([\d.]+)", lambda total: total < 0.5),
    ("lightning_module.py", ("lightning",), r"val/loss: ([\d.]+)", lambda loss: loss < 1),
    (
        "finetune_minilm.py", ("transformers", "accelerate", "peft"),
        r"Rep-MTL: quotient ([\d.]+)", lambda right: right > 0.9,
    ),
    (
        "what_tasks_do.py --quick", ("vizdoom", "tqdm", "matplotlib"),
        r"segmentation: .* normals \+([\d.]+)", lambda cosine: cosine > 0.2,
    ),
    # The rates of the items alone have an AUC of 0.69.
    (
        "recommendation.py --batch 2048 --epochs 4", (),
        r"Rep-MTL \(CSA alone\): click ([\d.]+)", lambda auc: auc > 0.73,
    ),
]  # fmt: skip

# Seconds without a word of progress. An idle machine needs at most ten, most of them for imports;
# a busy one whose disk is cold needs several times as many.
SILENCE = 60


def command_of(script: str) -> list[str]:
    """Return the command of an example's docstring, for this Python and any folder."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / script).read_text()))
    found = re.search(rf"\b(python|torchrun) [^;\n]*\bexamples/{script}\b.*", docstring)
    assert found, docstring
    program, *words = shlex.split(found[0])
    launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    path = f"examples/{script}"
    words = [str(ROOT / path) if word == path else word for word in words]
    return [sys.executable, *launcher, *words]


def run(program: str, folder: Path) -> tuple[int, str]:
    """Run an example; return its status and what it shows. Fail if it is silent for long."""
    script, *options = program.split()
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [*command_of(script), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    try:
        shown = read(screen)
    except BaseException:
        process.terminate()
        raise
    finally:
        os.close(screen)
        status = process.wait()
    return status, shown


def read(screen: int) -> str:
    """Return what a terminal shows until all programs have closed it."""
    shown = b""
    while True:
        ready, _, _ = select.select([screen], [], [], SILENCE)
        assert ready, f"nothing for {SILENCE} s after {shown.decode(errors='replace')[-1000:]!r}"
        try:
            piece = os.read(screen, 1 << 16)
        except OSError:  # Linux says so that it is closed
            piece = b""
        if not piece:
            return shown.decode()
        shown += piece


@pytest.mark.slow
@pytest.mark.slow_cpu
@pytest.mark.parametrize("program, libraries, figure, good", PROGRAMS, ids=[p[0] for p in PROGRAMS])
def test_example(program, libraries, figure, good, tmp_path):
    for library in libraries:
        pytest.importorskip(library)
    status, shown = run(program, tmp_path)
    assert status == 0, shown
    figures = [float(value) for value in re.findall(figure, shown)]
    assert figures and good(figures[-1]), shown


@pytest.mark.slow
@pytest.mark.slow_cpu
@pytest.mark.parametrize("script", ON_RANKS)
def test_example_on_two_processes(script, tmp_path):
    pytest.importorskip("mlxtend")
    if not ranks.HAS_GLOO:
        pytest.skip("needs gloo")
    status, shown = run(script, tmp_path)
    assert status == 0, shown
    figures = re.findall(r"left ([\d.]+)%, right ([\d.]+)%", shown)
    assert len(figures) == 2, shown
    assert min(map(float, figures[-1])) > 70, shown


@pytest.mark.slow
@pytest.mark.slow_cpu
@pytest.mark.parametrize("checkout", ["stand-in", "libmtl"])
def test_libmtl_checkout(checkout, tmp_path):
    path = STAND_IN if checkout == "stand-in" else os.environ.get(CHECKOUT)
    if path is None:
        pytest.skip(f"needs {CHECKOUT}, the path of a checkout of LibMTL")
    (tmp_path / "LibMTL").symlink_to(Path(path).resolve())
    status, shown = run(LIBMTL, tmp_path)
    assert status == 0, shown
    for kind in ("single input", "multi-input"):
        assert f"--- {kind} ---" in shown
    assert "LibMTL's Trainer trains with Rep-MTL." in shown


def test_libmtl_checkout_says_what_it_needs(tmp_path):
    (tmp_path / "LibMTL").mkdir()
    status, shown = run(LIBMTL, tmp_path)
    assert status == 1
    assert "expected a checkout of LibMTL, with LibMTL/trainer.py in it" in shown


def test_every_example_is_run_here():
    there = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}
    scripts = {program.split()[0] for program, *_ in PROGRAMS} | {*ON_RANKS, LIBMTL}
    assert there == scripts | HELPERS
    for helper in HELPERS:
        needed = f"from {Path(helper).stem} import"
        assert any(needed in (EXAMPLES / script).read_text() for script in scripts), helper
