"""Build entry point. All metadata is in pyproject.toml, and the build in csrc/native_build."""

import sys
from pathlib import Path

from setuptools import setup

# Isolated builds don't have this folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from native_build.commands import BuildNative, Wheel, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
