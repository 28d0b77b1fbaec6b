"""``python -m release``: builds a release into ``dist``, checks it, and says what it checked."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from release import files, installed
from release.versions import ROOT, faults


def main() -> None:
    """Build and check; exit at the first check that fails."""
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__)
    parser.add_argument("--torch", required=True, help="the PyTorch to test with")
    parser.add_argument("--platform", default="auto", help="the tag that the library has to fit")
    asked = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit(f"make dist: expected Linux, got {sys.platform}")
    if found := faults():
        raise SystemExit("\n".join(found))
    begin = time.monotonic()
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    print("building: the sdist, and both wheels from it", flush=True)
    built = files.build(dist, asked.platform)
    checked = files.check(built)
    print(f"installing into an empty environment: {asked.torch}, the files of dist", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checked += installed.check(built, asked.torch, Path(folder).resolve())
    print(f"built and checked in {time.monotonic() - begin:.0f} s:")
    for path in built:
        print(f"  {path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")
    for line in checked:
        print(f"  {line}")


if __name__ == "__main__":
    main()
