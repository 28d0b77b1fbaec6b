"""The stages as Triton kernels, for CUDA."""
