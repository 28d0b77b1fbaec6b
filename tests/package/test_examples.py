"""The examples run with the commands in their first lines, and their networks learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

ROOT = Path(__file__).parents[2]

# Script and options, the library that it needs, its last figure, and the bound that a trained model
# meets.
EXAMPLES = [
    ("plain_loop.py", None, r"held out: ([\d.]+)% of the pixels right", lambda share: share > 90),
    ("torchjd_aggregator.py", "torchjd", r"total ([\d.]+)", lambda total: total < 0.5),
    ("lightning_module.py", "lightning", r"val/loss: ([\d.]+)", lambda loss: loss < 1),
    ("finetune_minilm.py", "peft", r"Rep-MTL: quotient ([\d.]+)", lambda right: right > 0.9),
    (
        "what_tasks_do.py", "vizdoom",
        r"segmentation: .* normals \+([\d.]+)", lambda cosine: cosine > 0.2,
    ),
    # The rates of the items alone have an AUC of 0.69.
    (
        "recommendation.py --batch 2048 --epochs 4", None,
        r"Rep-MTL: click ([\d.]+)", lambda auc: auc > 0.73,
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.slow_cpu
@pytest.mark.parametrize("script, library, figure, good", EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_example(script, library, figure, good, tmp_path):
    if library is not None:
        pytest.importorskip(library)
    name, *options = script.split()
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = [float(value) for value in re.findall(figure, done.stdout)]
    assert figures and good(figures[-1]), done.stdout


@pytest.mark.slow
@pytest.mark.slow_cpu
@pytest.mark.parametrize("script", ["data_parallel.py", "sharded_encoder.py"])
def test_example_on_two_processes(script, tmp_path):
    pytest.importorskip("mlxtend")
    if not ranks.HAS_GLOO:
        pytest.skip("needs gloo")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "examples" / script],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = re.findall(r"left ([\d.]+)%, right ([\d.]+)%", done.stdout)
    assert len(figures) == 2, done.stdout
    assert min(map(float, figures[-1])) > 70, done.stdout


def test_libmtl_checkout_says_what_it_needs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "libmtl_checkout.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "expected a checkout of LibMTL, with LibMTL/trainer.py in it" in done.stderr
