"""The memory that CSA keeps for its backward, with and without its Gram matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import PRECISIONS, Case, Effort, backends, make_inputs
from benchmarks.line_up import FORWARD_BACKWARD
from benchmarks.memory import peak_extra_bytes
from benchmarks.networks import activated
from benchmarks.output import amount, captioned, of_rows, say, size_of
from benchmarks.part import Part, Run
from benchmarks.parts.kernels import call_of
from benchmarks.results import rounded
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import side_by_side
from repmtl_kernels import RepMTL, checkpoint_contexts, csa_loss
from repmtl_kernels._losses.backward import samples_at_a_time
from repmtl_kernels._training.strength import FIRST

SAVE, RECOMPUTE = "save", "recompute"
EFFORT, QUICK = Effort(0.0, 5, 5), Effort(0.0, 3, 3)
# The small network that is checkpointed: its heads, and convolutions of a head.
HEADS, LAYERS = 3, 4
CHECKPOINTED = ("nothing", "encoder", "heads", "both")


def side(s: Shape) -> int:
    return min(s.channels, s.positions)


def saliencies(s: Shape, itemsize: int = 4) -> int:
    """Return the bytes of the saliencies, which the backward needs with either choice."""
    return itemsize * s.elements


def matrices(s: Shape, itemsize: int = 4) -> int:
    """Return the bytes of the Gram matrices, which ``"save"`` keeps."""
    return itemsize * s.tasks * s.batch * side(s) ** 2


def projections(s: Shape) -> int:
    """Return the bytes of the anchors' products, which ``"save"`` keeps too."""
    return 4 * s.tasks**2 * s.batch * side(s)


def rest(s: Shape) -> int:
    """Return the bytes that the loss keeps with either choice, beside the saliencies."""
    return 4 * s.batch * (3 * s.tasks * s.channels + 5 * s.tasks + 1)


def at_a_time(s: Shape, itemsize: int = 4) -> int:
    """Return the bytes of the Gram matrices that the backward has with ``"recompute"``."""
    samples = samples_at_a_time((s.batch, s.channels, s.positions), s.tasks)
    return itemsize * s.tasks * min(samples, s.batch) * side(s) ** 2


def table() -> str:
    rows = [
        {
            "shape": name,
            "T, B, C, N": f"{s.tasks}, {s.batch}, {s.channels}, {s.positions}",
            "saliencies": amount(saliencies(s)),
            "matrices, saved": amount(matrices(s)),
            "of the saliencies": f"{100 * matrices(s) / saliencies(s):.3g} %",
            "made again, at a time": amount(at_a_time(s)),
        }
        for name, s in SHAPES.items()
    ]
    caption = (
        "From the formulas above by `benchmarks/parts/kept.py`, not measured: float32 at the "
        "batches of the networks; bfloat16 and float16 have half of it."
    )
    return f"{of_rows(rows)}\n\n{caption}"


def kept_bytes(loss: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """Return the bytes that the graph of a loss holds, without those of its inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(kept.values())


def measure(run: Run) -> None:
    precision = PRECISIONS[run.device.type][0]
    shapes = [shape.scaled(run.device.type) for shape in SHAPES.values()]
    run.each([Case("csa_loss", shape, precision) for shape in shapes], partial(measure_case, run))
    run.more["checkpointed"] = checkpointed(run.device)


def measure_case(run: Run, case: Case) -> list[dict]:
    inputs = make_inputs(case, run.device)
    rows = []
    for backend in backends(case.precision, run.device):
        if backend == "eager" and run.device.type == "cuda":
            continue
        calls, figures = {}, {}
        for memory in (SAVE, RECOMPUTE):
            loss = partial(csa_loss, backend=backend, memory=memory)
            calls[memory] = call = call_of(loss, FORWARD_BACKWARD, inputs)
            call()
            figures[f"{memory}_mb"] = kept_bytes(partial(loss, inputs[0]), inputs[0]) / 1e6
            figures[f"{memory}_peak_mb"] = peak_extra_bytes(call, run.device) / 1e6
        times = side_by_side(calls, run.device, QUICK if run.quick else EFFORT)
        figures["ratio"] = times[RECOMPUTE].ms / times[SAVE].ms
        labels = case.labels() | {"direction": FORWARD_BACKWARD, "backend": backend}
        rows.append(labels | rounded(figures))
        say(f"{case} {backend}: {rounded(figures)}")
    return rows


def checkpointed(device: torch.device, side: int = 48) -> list[dict]:
    """Return a step's peak in a small network, by what is under ``torch.utils.checkpoint``.

    The images have ``side`` rows and columns.
    """
    torch.manual_seed(0)
    encoder = nn.Sequential(*_convolutions(3), *_convolutions(16)).to(device)
    heads = nn.ModuleList(
        nn.Sequential(*_convolutions(16), nn.Conv2d(16, 2, 1)) for _ in range(HEADS)
    ).to(device)
    images = torch.randn(4, 3, side, side, device=device)
    rows = []
    for what in CHECKPOINTED:
        row: dict = {"checkpointed": what}
        for method, regularized in (("equal_weighting", False), ("rep_mtl", True)):
            criterion = RepMTL(0.5, 0.5).train(regularized)
            call = partial(_step, encoder, heads, images, what, criterion)
            for _ in range(FIRST + 1):  # an ordinary step comes after them, without a measurement
                call()
            row[f"{method}_peak_mb"] = peak_extra_bytes(call, device) / 1e6
        rows.append(rounded(row))
        say(", ".join(f"{key}: {value}" for key, value in rows[-1].items()))
    return rows


def _convolutions(channels: int) -> list[nn.Module]:
    layers = []
    for inputs in (channels, *[16] * (LAYERS - 1)):
        layers += activated(inputs, 16)
    return layers


def _step(
    encoder: nn.Module, heads: nn.ModuleList, images: Tensor, what: str, criterion: RepMTL
) -> None:
    def run(module: nn.Module, x: Tensor, on: bool) -> Tensor:
        if not on:
            return module(x)
        return checkpoint(module, x, use_reentrant=False, context_fn=checkpoint_contexts(module))

    z = run(encoder, images, what in ("encoder", "both"))
    outputs = [run(head, z, what in ("heads", "both")) for head in heads]
    total = criterion([y.square().mean() for y in outputs], z)
    torch.autograd.grad(total, [*encoder.parameters(), *heads.parameters()])


def kept_table(result: dict) -> str:
    """Return bytes until the backward, peak and time of both choices, for each backend."""
    rows = [
        {
            "shape": row["shape"],
            "T, B, C, N": size_of(row),
            "backend": row["backend"],
            "kept: saved, made again": f"{row['save_mb']:.4g} MB, {row['recompute_mb']:.4g} MB",
            "peak: saved, made again": (
                f"{row['save_peak_mb']:.4g} MB, {row['recompute_peak_mb']:.4g} MB"
            ),
            "time, made again": f"{row['ratio']:.2f}x",
        }
        for row in result["rows"]
    ]
    text = (
        "csa_loss in float32. Kept: between forward and backward, without the saliencies. Peak: "
        "over forward and backward, with the gradients, without the saliencies. Time of forward "
        "and backward, as a multiple of the time with saved matrices, with both in turns."
    )
    return captioned(of_rows(rows), result, text)


def checkpoint_table(result: dict) -> str:
    """Return the peak of a small network's step, by what of it is checkpointed."""
    rows = [
        {
            "checkpointed": row["checkpointed"],
            "equal weighting": f"{row['equal_weighting_peak_mb']:.4g} MB",
            "Rep-MTL": f"{row['rep_mtl_peak_mb']:.4g} MB",
        }
        for row in result["checkpointed"]
    ]
    text = (
        f"Peak of a step of a small network: encoder of {2 * LAYERS} convolutions with batch norm, "
        f"{HEADS} heads of {LAYERS}, all of one width and map size."
    )
    return captioned(of_rows(rows), result, text)


PART = Part(
    "kept",
    "KEPT: csa_loss that saves its Gram matrices and that makes them again, in turns",
    measure,
    {"kept": kept_table, "checkpoint": checkpoint_table},
)
