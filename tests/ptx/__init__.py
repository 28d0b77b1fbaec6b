"""A machine that runs PTX, the assembly that GPU compilers make, on the CPU in numpy.

It has no compiler's optimism: whatever a GPU must not do is a :class:`ptx.faults.Fault`. Numbers of
sections are those of NVIDIA's PTX ISA, version 9.
"""
