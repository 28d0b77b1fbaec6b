"""Studies: TOML files, and the training runs that they list."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).resolve().parent / "configs"
# Used where a study says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {},
    "network": {},
    "training": {
        "steps": 300, "batch": 16, "lr": 1e-3, "weight_decay": 1e-5, "halve_at": [0.5],
        "flip": False, "label_fraction": 1.0, "log_every": 10, "head_lr_factor": 1.0,
    },
    "pretraining": {
        "kind": "", "steps": 300, "batch": 16, "lr": 1e-3, "weight_decay": 1e-5,
    },
    # Settings are chosen on "validation", and confirmed on "test".
    "evaluation": {"split": "test"},
}  # fmt: skip
# Sections whose keys are those of the defaults; those of the others depend on a name in them.
FIXED = ("training", "pretraining", "evaluation")
STUDY_KEYS = {"datasets", "seeds", "methods", "grid", "override", "spectra"}
METHOD_KEYS = {"name", "method", "options", "grid", "against"}
SINGLE, EQUAL = "single", "equal"


@dataclass(frozen=True)
class Run:
    """One training run. Its results depend on `settings`, `method`, `options`, `task`, `seed`."""

    dataset: str  # the data set's file and what the grid varied
    label: str  # of the method, as tables name it
    family: str  # of the methods that a grid made
    method: str
    options: dict
    seed: int
    task: str | tuple[str, ...] | None  # the only task or the only ones; None: all
    settings: dict

    @property
    def key(self) -> str:
        """The name of the run's file: runs that would train alike share it."""
        return digest([self.settings, self.method, self.options, self.task, self.seed])

    @property
    def pretraining_key(self) -> str | None:
        """The name of the encoder that the run starts from; None where none was trained before."""
        if not self.settings["pretraining"]["kind"]:
            return None
        return digest([*(self.settings[k] for k in ("data", "network", "pretraining")), self.seed])

    def __str__(self) -> str:
        what = " + ".join(self.task) if isinstance(self.task, tuple) else self.task
        return f"{self.dataset}: {what or self.label}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """The content of a study file."""

    name: str
    datasets: dict[str, dict]  # settings by name in tables
    methods: list[dict]  # label, family, method, options, against
    seeds: list[int]
    spectra: bool

    def runs(self, tasks: dict[str, list[str]]) -> list[Run]:
        """Return all runs; tasks: names by data set, for the single-task ones."""
        runs = []
        for (dataset, settings), seed in itertools.product(self.datasets.items(), self.seeds):
            for m in self.methods:
                single = m["method"] == SINGLE
                method = EQUAL if single else m["method"]
                runs += [
                    Run(
                        dataset, m["label"], m["family"], method, m["options"], seed, task, settings
                    )
                    for task in (tasks[dataset] if single else [None])
                ]
        return runs


def digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def find(name: str, folder: str = "") -> Path:
    """Return a file by its path, or one of ``configs/folder`` by its name without ending."""
    return Path(name) if name.endswith(".toml") else CONFIGS / folder / f"{name}.toml"


def read(path: Path) -> dict:
    return tomllib.loads(path.read_text())


def study(path: Path, seeds: list[int] | None = None) -> Study:
    content = read(path)
    _known(path.name, content, STUDY_KEYS)
    overrides = content.get("override", {})
    datasets = {}
    for name in content["datasets"]:
        file = find(name, "data")
        settings = of_dataset(file)
        for section in ("all", file.stem):
            settings = merged(settings, overrides.get(section, {}))
        for label, variant in _variants(settings, content.get("grid", {})):
            for section in FIXED:
                _known(f"{file.name}: {section}", variant[section], set(DEFAULTS[section]))
            datasets[f"{file.stem}{label}"] = variant
    methods = [entry for method in content["methods"] for entry in _methods(path.name, method)]
    spectra = content.get("spectra", False)
    return Study(path.stem, datasets, methods, seeds or content["seeds"], spectra)


def of_dataset(file: Path) -> dict:
    """Return the settings in the file of a data set, with the defaults of all others."""
    return merged(DEFAULTS, read(file))


def merged(base: dict, changes: dict) -> dict:
    """Return a copy of `base` with the changes, section by section."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def _methods(file: str, method: dict) -> Iterator[dict]:
    _known(f"{file}: methods", method, METHOD_KEYS)
    for label, options in _variants(method.get("options", {}), method.get("grid", {})):
        yield {
            "label": method["name"] + label, "family": method["name"], "method": method["method"],
            "options": options, "against": method.get("against", ""),
        }  # fmt: skip


def _variants(settings: dict, grid: dict[str, list]) -> Iterator[tuple[str, dict]]:
    """Yield settings for every point of a grid, ``{"section.key": [values]}``, each labelled."""
    for values in itertools.product(*grid.values()):
        variant = copy.deepcopy(settings)
        for path, value in zip(grid, values, strict=True):
            *sections, key = path.split(".")
            here = variant
            for section in sections:
                here = here.setdefault(section, {})
            here[key] = value
        words = [
            f"{path.rsplit('.', 1)[-1]}={_short(value)}"
            for path, value in zip(grid, values, strict=True)
        ]
        yield (f" [{', '.join(words)}]" if words else ""), variant


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def _known(where: str, content: dict, keys: set[str]) -> None:
    if unknown := sorted(set(content) - keys):
        raise ValueError(f"{where}: unknown {unknown[0]!r}; known are {', '.join(sorted(keys))}")
