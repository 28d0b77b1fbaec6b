"""Runs ninja, and says why it failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from native_build.libraries import Library, files
from native_build.ninja_file import ninja_file
from native_build.tools import ninja, torch_folder

# The last lines of a compiler's messages are kept: there nvcc and the linker have their error.
LINES_KEPT = 12


def compile_library(library: Library, sources: list[str], target: Path, folder: Path) -> str | None:
    """Compile a library to ``target``, with objects in ``folder``; return why not, or None."""
    torch = torch_folder()
    assert torch is not None  # checked by why_not()
    (folder / "build.ninja").write_text(ninja_file(sources, target, torch))
    try:
        status, lines = _run_and_show([*ninja(), "-C", str(folder)])
    except OSError as error:
        return f"ninja does not run: {error}"
    if status != 0:
        return _failure(lines)
    if not target.exists():
        return f"the compiler reported success, but wrote no {target.name}"
    # PyTorch itself could load the library, but is not imported here.
    fault = files.damage(target, next(torch.glob("_C.*so"), None))
    if fault is None and library.namespace.encode() not in target.read_bytes():
        fault = "has no operators of this package"
    if fault is not None:
        fault = f"is not the library: it {fault}"
        return f"the compiler reported success, but its {target.name} {fault}"
    return None


def _run_and_show(command: list[str]) -> tuple[int, list[str]]:
    """Return the exit status and all lines of a command, and print the lines as they come."""
    sys.stdout.flush()
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}  # _failure() knows it
    lines = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            os.write(1, line)  # bytes: the locale may lack a compiler's quotation marks
            lines.append(line.decode(errors="replace").rstrip())
    return process.returncode, lines


def _failure(lines: list[str]) -> str:
    """Name the first target of ninja's that failed, with the last words of its command."""
    failed = [i for i, line in enumerate(lines) if line.startswith("FAILED: ")]
    if not failed:
        return "\n".join(["ninja failed:", *lines[-LINES_KEPT:]])
    # The target is the last word of the line. The command follows, and then its output.
    target = Path(lines[failed[0]].split()[-1]).name
    is_ninja = re.compile(r"\[\d+/\d+\] |FAILED: |ninja: ").match
    output = [*takewhile(lambda line: not is_ninja(line), lines[failed[0] + 2 :])]
    output = output[-LINES_KEPT:] or ["the compiler said nothing"]
    return "\n".join([f"{target} could not be built:", *output])
