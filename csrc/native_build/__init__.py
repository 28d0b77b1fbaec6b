"""Compiles csrc; setup.py imports it.

Needs a C++17 compiler, ninja and the headers of an installed PyTorch. PyTorch is not imported: the
libraries use its stable ABI, so one build serves every Python and every later PyTorch. The library
for CUDA is built where nvcc is; no GPU is needed.

A library that can't be built is left out with a warning, and the rest is installed. A text file in
the library's place keeps the reason, since pip shows warnings only with ``-v``; the package repeats
the reason at run time.

Variables of the environment:
    REPMTL_REQUIRE_NATIVE, REPMTL_REQUIRE_CUDA: set to 1, a failure of the library for the CPU or
        for CUDA is an error.
    REPMTL_SKIP_CUDA, REPMTL_SKIP_NATIVE: set to 1, the library for CUDA, or both, are left out.
    CXX, CXXFLAGS: the compiler, and flags after those of :mod:`native_build.ninja_file`.
    CUDA_HOME, CUDA_PATH: where nvcc is looked for first.
    TORCH_CUDA_ARCH_LIST: the architectures to build for.
"""
