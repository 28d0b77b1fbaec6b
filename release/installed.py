"""Installs a release's files into an empty environment and tests them, without the source tree."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from release.commands import run
from release.files import Files
from release.versions import declared

NAME = "repmtl-kernels"
TESTS = ("backends/test_native.py", "backends/test_backends.py", "losses/test_losses.py")
USE = """
import json, torch, repmtl_kernels
total = repmtl_kernels.rep_mtl_loss([torch.randn(4, 6, 5) for _ in range(2)]).total.item()
native = repmtl_kernels.backend_report()["native"]
print(json.dumps([repmtl_kernels.__file__, repmtl_kernels.__version__, native, total]))
"""


class Environment:
    """A virtual environment and a copy of the tests, in a folder outside of the source tree."""

    def __init__(self, folder: Path, sdist: Path, torch: str) -> None:
        self.prefix, self.tests = folder / "environment", folder / "tests"
        self.python = self.prefix / "bin" / "python"
        run(sys.executable, "-m", "venv", self.prefix, folder=folder)
        shutil.unpack_archive(sdist, folder / "sdist")
        (tree,) = (folder / "sdist").iterdir()
        self.tests.mkdir()
        for name in ("tests", "pyproject.toml"):  # the latter has pytest's options
            shutil.move(tree / name, self.tests)
        self.install("--no-compile", *torch.split())  # most of its modules are never imported

    def pip(self, *words: str | Path, **settings: str) -> str:
        """Run the environment's pip."""
        options = ("--disable-pip-version-check", "--no-input", "--quiet")
        return run(self.python, "-m", "pip", *options, *words, folder=self.prefix, **settings)

    def install(self, *words: str | Path, **settings: str) -> None:
        """Install requirements."""
        self.pip("install", *words, **settings)

    def replace(self, file: Path, **settings: str) -> None:
        """Install a file of the release in place of another."""
        self.pip("uninstall", "--yes", NAME)
        self.install("--no-deps", "--no-cache-dir", file, **settings)

    def preferred(self, folder: Path) -> list[str]:
        """Return the files that pip takes from a folder with all files of the release."""
        target = self.prefix / "preferred"
        where = ("--no-index", "--no-deps", "--find-links", folder, "--dest", target)
        self.pip("download", *where, NAME)
        return [path.name for path in target.iterdir()]

    def expect_native(self, pattern: str) -> None:
        """Compute a loss; exit if the package or its report of native is not the expected one."""
        printed = run(self.python, "-I", "-c", USE, folder=self.tests)
        file, version, native, total = json.loads(printed.splitlines()[-1])
        installed = Path(file).is_relative_to(self.prefix) and version == declared()
        if not (installed and total > 0 and re.fullmatch(pattern, native)):
            raise SystemExit(
                f"expected {NAME} {declared()} in {self.prefix}, with native: {pattern}; "
                f"got {version} in {file}, with native: {native}"
            )

    def passed(self, *tests: str, **settings: str) -> str:
        """Run one case of each test in these files, and return how many passed."""
        files = [f"tests/{test}" for test in tests]
        command = (self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--fast", *files)
        settings |= {"OMP_NUM_THREADS": "1"}
        last = run(*command, folder=self.tests, **settings).splitlines()[-1]
        return re.sub(r" in .*|=+ ?|, \d+ deselected", "", last)


def check(files: Files, torch: str, folder: Path) -> list[str]:
    """Return what was checked, a line each; exit if a check fails."""
    environment = Environment(folder, files.sdist, torch)
    environment.install(files.compiled)
    environment.pip("check")
    environment.install("pytest")
    if (found := environment.preferred(files.sdist.parent)) != [files.compiled.name]:
        raise SystemExit(f"expected pip to prefer {files.compiled.name}, got {found}")
    environment.expect_native("ok")
    tested = environment.passed(*TESTS, REPMTL_REQUIRE_NATIVE="1")
    lines = [f"{files.compiled.name}: native is ok; {tested}"]
    # pip builds it in isolation, as it does for a user.
    environment.replace(files.sdist, REPMTL_REQUIRE_NATIVE="1", REPMTL_SKIP_CUDA="1")
    environment.expect_native("ok")
    lines.append(f"{files.sdist.name}: native is ok")
    environment.replace(files.pure)
    environment.expect_native(".* built without it, since REPMTL_SKIP_NATIVE .*")
    tested = environment.passed(*TESTS[1:])
    return [*lines, f"{files.pure.name}: native is left out and says so; {tested}"]
