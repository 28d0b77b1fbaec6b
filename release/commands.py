"""Runs the programs that build and check a release."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Settings of whoever runs `make dist`, which a release must not depend on.
FOREIGN = ("PYTHON", "PYTEST_", "REPMTL_", "TRITON_")


def run(*command: str | Path, folder: Path, **settings: str) -> str:
    """Return what a command prints; show it and exit if the command fails.

    The programs of this interpreter's environment come first.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**kept, "PATH": path, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise SystemExit(f"{done.stdout}\nfailed with {done.returncode}: {words}")
    return done.stdout
