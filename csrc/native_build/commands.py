"""The commands of setuptools."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from native_build.compilation import compile_library
from native_build.libraries import BY_EXTENSION, ROOT, check_settings, files, is_set
from native_build.tools import why_not


def extensions() -> list[Extension]:
    """Return both libraries as setuptools knows them."""
    return [Extension(name, library.sources()) for name, library in BY_EXTENSION.items()]


class BuildNative(build_ext):
    """Builds both libraries with ninja.

    A library that is left out has a text file with the reason in its place.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of a library, without a tag of a Python: PyTorch loads it."""
        return f"{Path(*fullname.split('.'))}.so"

    def run(self) -> None:
        """Build both libraries; exit if a required one failed.

        Replaces the method of the base class, which would look for a compiler that is not used.
        """
        check_settings()
        reasons = {e.name: self._build(e) for e in self.extensions}
        if self.inplace:
            for built, in_place in self._files():
                in_place.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy(built, in_place)
        variables = {name: BY_EXTENSION[name].required_by for name in reasons}
        required = [name for name, why in reasons.items() if why and is_set(variables[name])]
        if required:
            raise SystemExit(
                "\n".join(f"{variables[name]} is set, but {reasons[name]}" for name in required)
            )

    def _build(self, extension: Extension) -> str | None:
        """Write the library, or the reason why it is left out, which is also returned."""
        library = BY_EXTENSION[extension.name]
        target = Path(self.build_lib, self.get_ext_filename(extension.name)).resolve()
        folder = Path(self.build_temp, extension.name).resolve()
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        note = files.note_of(target)
        reason = why_not(library) or compile_library(library, extension.sources, target, folder)
        if reason is None:
            note.unlink(missing_ok=True)
            return None
        # Otherwise the library of an earlier build would still be used.
        target.unlink(missing_ok=True)
        note.write_text(f"{reason}\n", encoding="utf-8")
        message = f"built without {library.title}: {reason}"
        print(f"repmtl_kernels: {message}", file=sys.stderr, flush=True)
        return message

    def _files(self) -> Iterator[tuple[Path, Path]]:
        """Yield the files that a build may leave, each in its folder and in the source tree."""
        for extension in self.extensions:
            library = Path(self.get_ext_filename(extension.name))
            for path in (library, files.note_of(library)):
                yield Path(self.build_lib, path), ROOT / path

    def get_outputs(self) -> list[str]:
        """Return the files that were built."""
        return [str(built) for built, _ in self._files() if built.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Return the files that were built and where ``--inplace`` copies them."""
        pairs = self._files() if self.inplace else ()
        return {str(built): str(in_place) for built, in_place in pairs if built.exists()}


class Wheel(bdist_wheel):
    """Builds one wheel for each platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of the platform, or of any platform without a library."""
        built = self.get_finalized_command("build_ext").get_outputs()
        compiled = any(path.endswith(".so") for path in built)
        return "py3", "none", super().get_tag()[2] if compiled else "any"
