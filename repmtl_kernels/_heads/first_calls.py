"""The first training calls look once at each task: can it be trained, has its saliency means?"""

from __future__ import annotations

import functools
import warnings

import torch

from repmtl_kernels._ground.saliency import is_transformed
from repmtl_kernels._heads import preflight
from repmtl_kernels._training.options import CriterionOptions
from repmtl_kernels._training.progress import Progress
from repmtl_kernels._training.tasks import Tasks

# Elements of a saliency that are looked at for means: little memory, and a large sample.
ENOUGH = 1 << 20


def check_losses(tasks: Tasks, progress: Progress, applied: bool) -> None:
    """Raise if a loss can't be trained with. Once for each task, since it takes all derivatives."""
    new = [task for task in tasks if task.key not in progress.checked_derivatives]
    if not new or any(is_transformed(task.loss) for task in tasks):
        return
    if any(task.loss.grad_fn is None for task in tasks):  # it has no saliency either
        return
    if preflight.check_losses(new, tasks, applied):
        progress.checked_derivatives.update(task.key for task in new)


ONE_POSITION = (
    "over: 'space' compares the positions of a sample, and the representation has one: TSR is 0, "
    "and so is its gradient. Use over='tasks', or lambda_tsr=0"
)


NAN_BEHIND_A_FINITE_LOSS = (
    "finite, but its gradient at the representation has NaN. Labels of NaN that torch.where takes "
    "out of the value stay in the gradient: replace them before the loss (nan_to_num)"
)


def warn_of_saliencies(tasks: Tasks, progress: Progress, options: CriterionOptions) -> None:
    """Warn of saliencies that have NaN, or that TSR or CSA see nothing of.

    Once for each task, since it waits for the device.
    """
    new = [task for task in tasks if task.key not in progress.checked_means]
    if not new or is_transformed(tasks[0].loss):
        return
    if tasks[0].loss.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    # Past forward and the two frames of nn.Module's call.
    warn = functools.partial(warnings.warn, stacklevel=6)
    if not progress.checked_means and options.lambda_tsr and options.over == "space":
        dim = options.channel_dim
        if any(s.numel() == s.shape[0] * s.shape[dim] for s in new[0].own_saliencies):
            warn(ONE_POSITION)
    progress.checked_means.update(task.key for task in new)
    for task in new:
        for saliency in task.own_saliencies:
            # One sample's means may be a single number, and that small by chance.
            samples = max(1, ENOUGH // saliency[0].numel())
            part = saliency.detach()[:samples]
            # With a scaler, saliencies overflow until it has found its scale.
            if options.scaler is None and part.isnan().any() and task.loss.isfinite():
                warn(f"losses[{task.key!r}]: {NAN_BEHIND_A_FINITE_LOSS}")
            for missing in preflight.without_means(part, options.channel_dim):
                if getattr(options, missing.option):
                    warn(f"losses[{task.key!r}]: {missing}")
