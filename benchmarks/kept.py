"""What CSA keeps for its backward, with and without its Gram matrices: bytes and time.

The bytes are formulas, and counted: a tensor counts once, with what is saved of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.distributed import amount
from benchmarks.kernels import Call, labels, make_inputs, rounded
from benchmarks.line_up import PRECISIONS, Case
from benchmarks.memory import peak_extra_bytes
from benchmarks.progress import markdown, say, track
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import block_ms
from repmtl_kernels import RepMTL, checkpoint_contexts, csa_loss
from repmtl_kernels._losses.backward import samples_at_a_time
from repmtl_kernels._training.strength import FIRST
from repmtl_kernels.backends.availability import refusal

SAVE, RECOMPUTE = "save", "recompute"
ROUNDS, QUICK_ROUNDS = 5, 3
# Of the small network that is checkpointed: its heads, and convolutions of a head.
HEADS, LAYERS = 3, 4
CHECKPOINTED = ("nothing", "encoder", "heads", "both")


def side(s: Shape) -> int:
    return min(s.channels, s.positions)


def saliencies(s: Shape, itemsize: int = 4) -> int:
    """Bytes of the saliencies, which the backward needs with either choice."""
    return itemsize * s.elements


def matrices(s: Shape, itemsize: int = 4) -> int:
    """Bytes of the Gram matrices, which ``"save"`` keeps."""
    return itemsize * s.tasks * s.batch * side(s) ** 2


def projections(s: Shape) -> int:
    """Bytes of the anchors' products, which ``"save"`` keeps too."""
    return 4 * s.tasks**2 * s.batch * side(s)


def rest(s: Shape) -> int:
    """Bytes that the loss keeps with either choice, of its own."""
    return 4 * s.batch * (3 * s.tasks * s.channels + 5 * s.tasks + 1)


def at_a_time(s: Shape, itemsize: int = 4) -> int:
    """Bytes of the Gram matrices that the backward has with ``"recompute"``."""
    samples = samples_at_a_time((s.batch, s.channels, s.positions), s.tasks)
    return itemsize * s.tasks * min(samples, s.batch) * side(s) ** 2


def table() -> str:
    header = ["shape", "T, B, C, N", "saliencies", "matrices, saved", "of the saliencies"]
    header += ["made again, at a time"]
    lines = [
        [
            name,
            f"{s.tasks}, {s.batch}, {s.channels}, {s.positions}",
            amount(saliencies(s)),
            amount(matrices(s)),
            f"{100 * matrices(s) / saliencies(s):.3g} %",
            amount(at_a_time(s)),
        ]
        for name, s in SHAPES.items()
    ]
    caption = (
        "From the formulas above by `benchmarks/kept.py`, not measured: float32 at the batches of "
        "the networks; bfloat16 and float16 have half of it."
    )
    return f"{markdown(header, lines)}\n\n{caption}"


def kept_bytes(loss: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Bytes that the graph of a loss holds, without those of ``given``."""
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel():
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(found.values())


def measure(device: torch.device, *, quick: bool, deadline: float) -> tuple[list[dict], list[str]]:
    """Rows for every shape and backend, and notes on what was left out.

    deadline: ``time.monotonic()`` after which no further shape starts.
    """
    rows: list[dict] = []
    notes: list[str] = []
    precision = PRECISIONS[device.type][0]
    names = ["triton"] if device.type == "cuda" else ["eager"]
    if refusal("native", precision.dtype, device) is None:
        names.append("native")
    for shape in track(list(SHAPES.values()), "kept"):
        case = Case("csa_loss", shape.scaled(device.type), precision, "contiguous", False)
        if time.monotonic() > deadline:
            notes.append(f"left out for time: {case}")
            say(notes[-1])
            continue
        inputs = make_inputs(case, device)
        for backend in names:
            rows.append(_row(case, backend, inputs, device, QUICK_ROUNDS if quick else ROUNDS))
            row = rows[-1]
            say(
                f"{case} {backend}: kept {row['save_mb']:.4g} and {row['recompute_mb']:.4g} MB, "
                f"peak {row['save_peak_mb']:.4g} and {row['recompute_peak_mb']:.4g} MB, "
                f"time {row['ratio']:.3g}x"
            )
    return rows, notes


def checkpointed(device: torch.device) -> list[dict]:
    """Peak of a step of a small network, by what of it is under ``torch.utils.checkpoint``."""
    torch.manual_seed(0)
    encoder = nn.Sequential(_convolutions(3, 16), _convolutions(16, 16)).to(device)
    heads = nn.ModuleList(
        nn.Sequential(_convolutions(16, 16), nn.Conv2d(16, 2, 1)) for _ in range(HEADS)
    ).to(device)
    images = torch.randn(4, 3, 48, 48, device=device)
    rows = []
    for what in CHECKPOINTED:
        row = {"checkpointed": what}
        for method, regularized in (("equal_weighting", False), ("rep_mtl", True)):
            criterion = RepMTL(0.5, 0.5).train(regularized)
            call = partial(_step, encoder, heads, images, what, criterion)
            for _ in range(FIRST + 1):  # an ordinary step comes after them, without a measurement
                call()
            row[f"{method}_peak_mb"] = peak_extra_bytes(call, device) / 1e6
        rows.append(rounded(row))
        say(", ".join(f"{key}: {value}" for key, value in rows[-1].items()))
    return rows


def _convolutions(channels: int, width: int) -> nn.Sequential:
    layers = []
    for given in (channels, *[width] * (LAYERS - 1)):
        layers += [nn.Conv2d(given, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def _step(
    encoder: nn.Module, heads: nn.ModuleList, images: Tensor, what: str, criterion: RepMTL
) -> None:
    def run(module: nn.Module, x: Tensor, on: bool) -> Tensor:
        if not on:
            return module(x)
        return checkpoint(module, x, use_reentrant=False, context_fn=checkpoint_contexts(module))

    z = run(encoder, images, what in ("encoder", "both"))
    outputs = [run(head, z, what in ("heads", "both")) for head in heads]
    losses = [y.square().mean() for y in outputs]
    total = criterion(losses, z)
    torch.autograd.grad(total, [*encoder.parameters(), *heads.parameters()])


def _row(
    case: Case, backend: str, inputs: list[list[Tensor]], device: torch.device, rounds: int
) -> dict:
    calls, figures = {}, {}
    for memory in (SAVE, RECOMPUTE):
        loss = partial(csa_loss, backend=backend, memory=memory)
        calls[memory] = call = Call("forward_backward", loss, inputs)
        call()
        figures[f"{memory}_mb"] = kept_bytes(partial(loss, inputs[0]), inputs[0]) / 1e6
        figures[f"{memory}_peak_mb"] = peak_extra_bytes(call, device) / 1e6
    # Of neighbours in time: what slows the machine down is in both.
    ratios = []
    for _ in range(rounds):
        save, recompute = (block_ms(calls[memory], 1, device) for memory in (SAVE, RECOMPUTE))
        ratios.append(recompute / save)
    figures["ratio"] = statistics.median(ratios)
    figures["ratio_spread"] = max(ratios) - min(ratios)
    return labels(case, backend, "forward_backward") | rounded(figures)
