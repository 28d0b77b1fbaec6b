"""A machine that runs PTX, the assembly that GPU compilers make, on the CPU in numpy.

Unknown instructions, and most that a GPU must not do, are a :class:`ptx.faults.Fault`. It has no
races of global memory but stores of one instruction, and one schedule. Its sums and functions are
more exact than a GPU's. Sections are those of NVIDIA's PTX ISA, version 9. Start with
``machine.run``, then ``Machine._advance``.

program, kernel              from text to instructions; what these are
machine                      runs a launch: lanes in lockstep, branches, barriers, registers
instructions/                a family a module: ``decodes`` registers, ``operands`` reads and writes
shared_memory                shared memory, and the record that finds races
global_memory, local_memory  loads and stores with checked addresses
observer                     tells of a launch: ``counters`` and ``latency`` listen
instruction_classes          which unit executes an instruction
driver/                      a stand-in for the CUDA driver: Triton compiles, the machine runs
csrc, csrc_damage            the same for nvcc's PTX of csrc/cuda, and damage to it
process, worker, conftest    the process where Triton compiles; markers ``compiled`` and ``whole``
tier, programs               shared by tests: cases and modes; small kernels
report, count_step           the table of ``make ptx``; launches and allocations of a step
"""
