"""Prints the kernels that a loss launches and :mod:`benchmarks.prewarm` has not compiled.

In a process of its own: that of the tests may interpret.
"""

import json

import torch

from benchmarks import cases, prewarm
from benchmarks.parts import kernels
from benchmarks.shapes import Shape
from benchmarks.static_report import compiled_instead_of_launched
from repmtl_kernels.backends import choice

N_SIDE, C_SIDE = (
    Shape(name, 3, 2, c, h, w, 2, "test") for name, c, h, w in (("N", 24, 4, 4), ("C", 16, 4, 6))
)

choice.refusal = lambda *_: None
compiled, missing = 0, []
for shape, precision in ((N_SIDE, cases.BFLOAT16), (C_SIDE, cases.TF32)):
    known = prewarm.compile_case(cases.Case("rep_mtl_loss", shape, precision), 90)
    compiled += len(known)
    for function in {c.function for c in kernels.decisive()}:
        case = cases.Case(function, shape, precision)
        inputs = cases.make_inputs(case, torch.device("cpu"))
        with cases.products_in(precision), compiled_instead_of_launched(90) as launched:
            for direction in ("forward", "forward_backward"):
                kernels.call_of(kernels.of_backend(case, "triton"), direction, inputs)()
        missing += [
            f"{case}: {kernel.metadata.name}"
            for hash_, kernel in launched.items()
            if hash_ not in known
        ]
        assert launched
print(json.dumps({"compiled": compiled, "missing": missing}))
