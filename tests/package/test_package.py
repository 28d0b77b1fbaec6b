"""The package that users get: imports, public names, metadata, files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import repmtl_kernels
from release.versions import declared

ROOT = Path(__file__).resolve().parents[2]

LOSSES = ("tsr_loss", "csa_loss", "rep_mtl_loss")
MODULES = ("TSRLoss", "CSALoss", "RepMTLLoss")
PUBLIC = {
    *LOSSES,
    *MODULES,
    "RepMTLLosses",
    "RepMTL",
    "Levels",
    "LogLosses",
    "SaliencyMonitor",
    "SaliencySummary",
    "SaliencyHistory",
    "plot_affinity",
    "plot_history",
    "plot_saliency",
    "write_report",
    "to_tensorboard",
    "to_wandb",
    "SecondDerivativeError",
    "task_saliencies",
    "saliency_affinity",
    "group_tasks",
    "Grouping",
    "second_order",
    "convert_second_order",
    "checkpoint_contexts",
    "reference",
    "available_backends",
    "backend_report",
}

DEFAULTS = {
    "tsr_loss": {
        "over": "tasks",
        "normalizer": "abs",
        "temperature": 1.0,
        "floor": 0.0,
        "eps": 0.0,
        "channel_dim": 1,
        "backend": "auto",
    },
    "csa_loss": {
        "temperature": 0.5,
        "eps": 0.0,
        "present": None,
        "channel_dim": 1,
        "group": None,
        "memory": "auto",
        "backend": "auto",
    },
    "rep_mtl_loss": {
        "lambda_tsr": 0.01,
        "lambda_csa": 0.01,
        "over": "tasks",
        "normalizer": "abs",
        "tsr_temperature": 1.0,
        "tsr_floor": 0.0,
        "csa_temperature": 0.5,
        "eps": 0.0,
        "channel_dim": 1,
        "group": None,
        "memory": "auto",
        "backend": "auto",
    },
}


def run_python(code: str, **env: str) -> str:
    """Return the output of ``code`` in a fresh interpreter that imports this checkout's package."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    base = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "REPMTL_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**base, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_triton_and_cuda() -> None:
    out = run_python(
        """
import json, sys
sys.modules["triton"] = None
import torch
import repmtl_kernels as rk
torch.manual_seed(0)
saliencies = [torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2)]
value = rk.tsr_loss(saliencies).item() + rk.csa_loss(saliencies).item()
judge = rk.reference.tsr_loss(saliencies).item() + rk.reference.csa_loss(saliencies).item()
refusal = "none"
try:
    rk.tsr_loss(saliencies, backend="triton")
except (ImportError, RuntimeError, ValueError) as error:
    refusal = str(error)
print(json.dumps([list(rk.available_backends()), rk.backend_report(), value, judge, refusal]))
""",
        CUDA_VISIBLE_DEVICES="",
    )
    available, report, value, judge, refusal = json.loads(out)
    assert {"reference", "eager"} <= set(available)
    assert "triton" not in available
    assert "triton cannot be imported" in report["triton"], "the report names what is missing"
    assert value == pytest.approx(judge, rel=1e-12)
    assert "triton" in refusal, f"asked for by name, it must raise, and say why; got {refusal!r}"


def test_import_alone() -> None:
    """An import loads no Triton and no benchmark tools, starts no CUDA, and needs no metadata."""
    out = run_python(
        """
import importlib.metadata, json, sys
import torch
installed_version = importlib.metadata.version
def version(name):
    if name.replace("_", "-") == "repmtl-kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return installed_version(name)
importlib.metadata.version = version
before = set(sys.modules)
import repmtl_kernels
heavy = "triton torchjd lightning transformers matplotlib sklearn mlxtend pytest benchmarks".split()
heavy += ["tensorboard", "wandb"]
loaded = sorted(m for m in set(sys.modules) - before if m.split(".")[0] in heavy)
print(json.dumps([loaded, torch.cuda.is_initialized(), repmtl_kernels.__version__]))
"""
    )
    loaded, cuda, version = json.loads(out)
    assert loaded == [] and cuda is False
    assert version, "a version that says that it is not an installed one"
    assert version != declared(), "the number has one place, pyproject.toml"


def test_public_names_are_the_documented_ones() -> None:
    assert set(repmtl_kernels.__all__) - {"__version__"} == PUBLIC
    assert len(repmtl_kernels.__all__) == len(set(repmtl_kernels.__all__))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_documented(name: str) -> None:
    public = getattr(repmtl_kernels, name)
    # Not inspect.getdoc: it would accept the docstring of a base class.
    doc = public.__doc__
    assert doc and len(doc.split()) >= 5, f"{name} needs a docstring of its own"
    assert not re.match(rf"{name}\(", doc), f"{name} has the generated docstring of its type only"


@pytest.mark.parametrize("name", LOSSES)
def test_loss_signature(name: str) -> None:
    first, *options = inspect.signature(getattr(repmtl_kernels, name)).parameters.values()
    assert first.name == "saliencies"
    assert first.default is inspect.Parameter.empty
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in options)
    defaults = {p.name: p.default for p in options}
    assert {key: defaults.get(key, "missing") for key in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("module, loss", list(zip(MODULES, LOSSES, strict=True)))
def test_module_takes_the_options_of_its_function(module: str, loss: str) -> None:
    of_module = inspect.signature(getattr(repmtl_kernels, module)).parameters
    per_call = {"present"}  # data of one batch, not an option
    options = DEFAULTS[loss].keys() - per_call
    assert {key: of_module[key].default for key in options} == {
        key: DEFAULTS[loss][key] for key in options
    }


@pytest.mark.parametrize("name", ("tsr_loss", "csa_loss"))
def test_reference_takes_the_options_of_the_public_function(name: str) -> None:
    of_reference = inspect.signature(getattr(repmtl_kernels.reference, name)).parameters
    options = DEFAULTS[name].keys() - {"backend"}
    assert {key: of_reference[key].default for key in options} == {
        key: DEFAULTS[name][key] for key in options
    }


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_api_is_typed(name: str) -> None:
    public = getattr(repmtl_kernels, name)
    if isinstance(public, ModuleType):
        functions = [public.tsr_loss, public.csa_loss]
    elif inspect.isclass(public) and issubclass(public, Exception):
        return
    elif dataclasses.is_dataclass(public):
        assert set(public.__annotations__) == {field.name for field in dataclasses.fields(public)}
        return
    elif inspect.isclass(public) and not issubclass(public, tuple):
        functions = [public.__init__, public.forward]
    elif inspect.isclass(public) and not hasattr(public, "_fields"):
        functions = [public.__new__, public.like, public.items]
    elif inspect.isclass(public):
        assert set(public.__annotations__) == set(public._fields)
        return
    else:
        functions = [public]
    for function in functions:
        signature = inspect.signature(function)
        untyped = [
            p.name
            for p in signature.parameters.values()
            if p.name not in ("self", "cls") and p.annotation is inspect.Parameter.empty
        ]
        assert not untyped, f"{name}.{function.__name__}: no type for {untyped}"
        assert signature.return_annotation is not inspect.Signature.empty, function.__name__


def test_version_is_the_declared_one() -> None:
    try:
        installed = importlib.metadata.version("repmtl-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("repmtl-kernels is not installed here, only on the path")
    assert installed == declared(), "installed from other sources: run `make venv`"
    assert repmtl_kernels.__version__ == installed


def test_build_ships_every_module_and_the_type_marker_and_nothing_else(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="reads PEP 639 metadata")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("repmtl_kernels", "csrc", "tests", "benchmarks"):
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"setuptools {setuptools.__version__}: {done.stderr}"
    built = {str(p.relative_to(tmp_path / "built")) for p in (tmp_path / "built").rglob("*.*")}
    package = tmp_path / "repmtl_kernels"
    wanted = {str(p.relative_to(tmp_path)) for p in package.rglob("*.py")}
    page = {f"repmtl_kernels/_monitor/report/page.{kind}" for kind in ("css", "html")}
    assert built == wanted | page | {"repmtl_kernels/py.typed"}


def test_no_private_path_in_the_files() -> None:
    folders = ("repmtl_kernels", "csrc", "tests", "benchmarks", ".ci", ".github")
    candidates = [p for p in ROOT.iterdir() if p.is_file()]
    candidates += [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    text = {"", ".py", ".toml", ".md", ".json", ".yml", ".svg", ".cpp", ".cu", ".h", ".csv", ".txt"}
    files = [p for p in candidates if p.suffix in text and p.name not in (".git", ".coverage")]
    assert len(files) > 20
    home = re.compile(r"(?<![\w.}])/(?:home|root|Users|work)/[\w.-]+")
    private = {
        str(path.relative_to(ROOT)): hits
        for path in files
        if (hits := home.findall(path.read_text(encoding="utf-8")))
    }
    assert not private
