"""Losses in the logarithm: it is defined above 0 alone."""

from __future__ import annotations

import torch

from repmtl_kernels._ground.saliency import is_transformed
from repmtl_kernels._training.running_mean import DeferredValue
from repmtl_kernels._training.tasks import Tasks


@torch.no_grad()
def check_logarithms(tasks: Tasks, offset: float, seen: DeferredValue) -> None:
    """Raise if a loss has no logarithm. NaN passes: it shows in the total.

    Args:
        tasks: with their losses.
        offset: what is added to the losses. It is for losses that may be 0, and allows no negative
            ones.
        seen: the criterion's reader. On CUDA it answers about earlier calls, since this one would
            have to wait for the device. On other devices than CPU and CUDA nothing is refused, and
            neither is it inside ``torch.func`` and compiled regions.

    Raises:
        ValueError: a loss is negative, or it is 0 and the offset is too.
    """
    if any(is_transformed(task.loss) for task in tasks):
        return
    # A scalar on the CPU may be summed with those of a device.
    device = next((t.loss.device for t in tasks if not t.loss.is_cpu), tasks[0].loss.device)
    flags_of_tasks = [task.loss < 0 if offset else task.loss <= 0 for task in tasks]
    bad = torch.stack([flag.to(device, non_blocking=True) for flag in flags_of_tasks])
    for flags, keys in seen.read(bad, [task.key for task in tasks]):
        if not flags.any():
            continue
        row = flags.tolist().index(True)
        got = "got one that is not, in an earlier call"
        if flags is bad:
            got = f"got {float(tasks[row].loss):g}"
        least = "of at least 0" if offset else "above 0"
        raise ValueError(
            f"losses[{keys[row]!r}]: expected a loss {least}, which has a logarithm; {got}. Pass "
            "None for a task without labels in this batch. A loss that can be 0 needs log_offset, "
            "and a loss that can be negative can't be in the logarithm"
        )
