"""The training criterion: task losses, their saliencies and the regulariser (eq. 3 and 10)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from repmtl_kernels import _distributed
from repmtl_kernels._distributed import Group
from repmtl_kernels._ground.checks import checked_step
from repmtl_kernels._ground.saliency import has_values
from repmtl_kernels._heads import first_calls, preflight
from repmtl_kernels._heads.second_order import second_order
from repmtl_kernels._monitor.monitor import SaliencyMonitor
from repmtl_kernels._training.arguments import (
    Positions,
    Representation,
    TaskLosses,
    Weights,
    checked_weights,
)
from repmtl_kernels._training.logarithm import check_logarithms
from repmtl_kernels._training.options import CriterionOptions
from repmtl_kernels._training.progress import Progress
from repmtl_kernels._training.regularizer import Regularizer
from repmtl_kernels._training.saliencies import check_graph, take_saliencies
from repmtl_kernels._training.step import RepMTLStep
from repmtl_kernels._training.tasks import Tasks
from repmtl_kernels.modules import LossModule

# For a criterion that is given neither lambdas nor a strength (docs/tuning.md has the evidence).
DEFAULT_STRENGTH = 0.03
# For a criterion that is given neither lambdas nor `every`. With lambdas it is 1, and the total
# equation 10.
DEFAULT_EVERY = 4
# For a lambda that is left out beside the other.
DEFAULT_LAMBDA = 0.01


def task_saliencies(
    losses: TaskLosses, representation: Representation
) -> list[Tensor] | list[list[Tensor]]:
    """Return the task saliencies ``S_t = dL_t/dZ`` of Rep-MTL, arXiv 2507.21049, eq. 3.

    They have a graph, so that a loss on them trains encoder and heads (second order). The losses
    keep their own graph and can be differentiated again.

    Args:
        losses: list, tuple or dict of T scalar losses of shape ``()``, each with its graph. One
            stacked tensor is refused, and so are its elements: each of them backpropagates zeros
            through the branches of all other tasks.
        representation: the shared representation ``Z``, or :class:`Levels` of several. It has to be
            the very tensor that went into the heads. In multi-input learning, where each task has
            its own batch, one (or one :class:`Levels`) per task: a list or tuple, or a dict with
            the keys of ``losses`` if that is a dict.

    Returns:
        T tensors in the order of ``losses``, each of its representation's shape, dtype and device.
        With :class:`Levels`, each task has a list with one tensor for each level; it is zero where
        the loss does not depend on that level. Hooks on the representation don't run.

    Raises:
        ValueError, TypeError: an argument is not as described, a loss has no graph, a loss does not
            depend on the representation, or gradients are disabled.
    """
    tasks = Tasks(losses, representation)
    tasks.place(representation)
    check_graph(tasks)
    take_saliencies(tasks)
    if not tasks.has_levels:
        return [saliency for task in tasks for saliency in task.own_saliencies]
    return [
        [
            torch.zeros_like(z) if saliency is None else saliency
            for z, saliency in zip(task.representations, task.saliencies, strict=True)
        ]
        for task in tasks
    ]


class RepMTL(LossModule):
    """The objective of Rep-MTL, arXiv 2507.21049, eq. 10, in place of the sum of the task losses.

    A training step calls it with the task losses and the representation::

        criterion = RepMTL()
        z = encoder(x)
        total = criterion([loss(head(z), y) for head, loss, y in ...], z)
        total.backward()

    The total is ``sum_t w_t L_t + lambda_tsr TSR + lambda_csa CSA``. The regulariser is
    differentiated through the saliencies, so the heads, and everything else that follows the
    representation, need second derivatives. ``RepMTL.check(heads, z)`` tells whether they have
    them. ``with criterion.second_order():`` around the heads makes that pass faster.

    In ``eval()`` mode the result is ``sum_t w_t L_t`` alone (with ``log_losses`` the sum of the
    logarithms). It needs no graph and works under ``torch.no_grad()``.

    If you set the lambdas, the total is equation 10 exactly. ``RepMTL()`` instead applies the
    regulariser on the first of four calls (``every=4``), and holds its gradient at 3 % of the
    tasks' on average over all calls (``strength=0.03``). On the other three calls the total is
    ``sum_t w_t L_t``. All options are attributes, and a schedule may set them. The number of
    training calls and the running means are part of ``state_dict()``; a checkpoint without them
    leaves them as they are.

    Args:
        lambda_tsr: weight of :func:`tsr_loss`, at least 0 (the paper: 0.7 to 1.5). At exactly 0 TSR
            is not computed. None: 0.01.
        lambda_csa: the same for :func:`csa_loss`. CSA needs a batch of at least 2; TSR does not.
        strength: ``rho``, at least 0 (0: off), or None: the lambdas count as they are (0.03 if
            these are None too). The norm of the regulariser's gradient at the representation is
            held at ``rho`` times the norm of the gradient of ``sum_t w_t L_t`` there, and the
            lambdas only give the mix of TSR and CSA. TSR and CSA are invariant to the scale of the
            losses, so with fixed lambdas that ratio grows while the tasks are learned. The ratio is
            measured on the first 16 calls that apply the regulariser and on every 24th after them
            (with ``every=4`` on every 96th call). A measurement takes the regulariser's gradient by
            itself, so nothing else that reaches the representation counts. The mean is over about
            the last three of them (exponential, decay 0.6). ``rho`` is held on average; single
            steps vary. The lambdas never sum to more than ``100 rho``. If they come to less than
            ``rho / 100``, a warning says so once (on the CPU and on CUDA). See ``last.ratio``.
        start: the first ``start`` calls in training mode have no regulariser, and cost no more than
            the losses. Calls with the same ``step`` count as one.
        ramp: after the first ``start`` calls the weight of the regulariser grows linearly, and is
            full at the ``ramp``-th call after them.
        over, normalizer, tsr_temperature, tsr_floor: options of :func:`tsr_loss`.
        csa_temperature: option of :func:`csa_loss`.
        group: option of :func:`csa_loss`; all ranks give negatives. With ``strength`` all ranks
            have the same weight, from the mean over their measurements.
        memory: option of :func:`csa_loss`: ``"auto"``, ``"save"`` or ``"recompute"``.
        eps, channel_dim, backend: options of both losses.
        log_losses: put ``log L_t`` in place of ``L_t``, in the sum and in the saliencies
            (:class:`LogLosses` is this without the regulariser). It is for losses above 0; a loss
            that is 0 or negative is refused. On CUDA it is found in a later call, so that no call
            waits for the device; until then the total is infinite or NaN. It stays so on other
            devices, and inside ``torch.func`` and compiled regions.
        log_offset: at least 0; ``log_losses`` takes ``log(L_t + log_offset)``, e.g. with 0.01, for
            losses that can be 0. It bounds the weight ``1 / (L_t + log_offset)`` of a task that is
            nearly learned.
        clip: a number above 0, or None. ``|dR/dS| |S|`` is the size of the regulariser's gradient
            at the saliencies of all tasks, free of scale. If it is more than ``clip`` times its
            running mean (decay 0.98, over the unclipped sizes before this one), the gradient is
            scaled down to that, for heads and encoder alike. TSR's gradient is heavy-tailed from
            batch to batch; 2 to 3 cuts the tail. The tasks' own gradients stay as they are.
            ``dR/dS`` is computed in the call, and kept for the backward pass in place of what CSA
            keeps.
        task_weights: ``w_t``, finite and at least 0: a sequence, or a dict with the keys of the
            losses. None: all 1. The saliencies are the gradients of ``L_t`` (or ``log L_t``)
            without their weights.
        scaler: the ``torch.amp.GradScaler`` that scales the total, for float16, or None. The losses
            are multiplied with its scale before their saliencies are taken, so that these do not
            underflow. TSR and CSA do not depend on the scale, and the total is not scaled. With
            ``"softmax"`` or ``eps`` the scale is divided out in float32. If scaled saliencies
            overflow, the total is NaN, and the scaler skips that step like any other with infinite
            gradients. Without a scaler, watch ``last.underflow``. ``copy.deepcopy`` keeps the
            scaler. A pickled criterion has a copy of it: set ``criterion.scaler`` to the one that
            you update.
        every: apply the regulariser on every ``every``-th call in training mode, the first
            included, at ``every`` times its weight (lazy regularisation, as StyleGAN2 does with
            R1). With ``strength`` the mean over all calls is ``rho``. None: 4, or 1 if a lambda is
            set.
        monitor: a :class:`SaliencyMonitor` that observes some of the training calls, or None. It
            changes neither the total nor a gradient.

    A measurement of the ratio is one more backward pass through the heads. With wide ASPP heads and
    ``every=1`` it costs 1.3 % of a step on average, and 2.3 % without ``second_order()``. Each
    process has its own ``clip``, and without ``group`` its own ``strength``. Both keep running
    means, which ``torch.func`` and compiled regions around the criterion don't allow. A CUDA graph
    repeats the call that it captured, with or without the regulariser: set ``every=1``, or capture
    one graph of each kind. It has no measurements in it: run 16 calls with the regulariser before
    the capture, and one without the graph now and then if the weight is to follow the training.
    Replicas that ``nn.DataParallel`` makes count as one call;
    the first of them carries on the criterion's state and ``last``. Calls on meta or fake tensors
    (dry runs) leave the state as it was.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    lambda_tsr: float
    lambda_csa: float
    strength: float | None
    start: int
    ramp: int
    over: str
    normalizer: str
    tsr_temperature: float
    tsr_floor: float
    csa_temperature: float
    eps: float
    log_losses: bool
    log_offset: float
    clip: float | None
    task_weights: Weights | None
    scaler: torch.amp.GradScaler | None
    every: int
    monitor: SaliencyMonitor | None
    group: Group | None
    memory: str

    check = staticmethod(preflight.check)

    def __init__(
        self,
        lambda_tsr: float | None = None,
        lambda_csa: float | None = None,
        *,
        strength: float | None = None,
        start: int = 0,
        ramp: int = 0,
        over: str = "tasks",
        normalizer: str = "abs",
        tsr_temperature: float = 1.0,
        tsr_floor: float = 0.0,
        csa_temperature: float = 0.5,
        eps: float = 0.0,
        log_losses: bool = False,
        log_offset: float = 0.0,
        clip: float | None = None,
        task_weights: Weights | None = None,
        scaler: torch.amp.GradScaler | None = None,
        every: int | None = None,
        monitor: SaliencyMonitor | None = None,
        channel_dim: int = 1,
        group: Group | None = None,
        memory: str = "auto",
        backend: str = "auto",
    ) -> None:
        without_lambdas = lambda_tsr is None and lambda_csa is None
        if without_lambdas and strength is None:
            strength = DEFAULT_STRENGTH
        if every is None:
            every = DEFAULT_EVERY if without_lambdas else 1
        options = CriterionOptions(
            lambda_tsr=DEFAULT_LAMBDA if lambda_tsr is None else lambda_tsr,
            lambda_csa=DEFAULT_LAMBDA if lambda_csa is None else lambda_csa,
            strength=strength,
            start=start,
            ramp=ramp,
            over=over,
            normalizer=normalizer,
            tsr_temperature=tsr_temperature,
            tsr_floor=tsr_floor,
            csa_temperature=csa_temperature,
            eps=eps,
            log_losses=log_losses,
            log_offset=log_offset,
            clip=clip,
            task_weights=checked_weights(task_weights),
            scaler=scaler,
            every=every,
            monitor=monitor,
            channel_dim=channel_dim,
            group=group,
            memory=memory,
            backend=backend,
        )
        super().__init__(**vars(options))
        self._checked_options()
        self._progress = Progress()

    @property
    def last(self) -> RepMTLStep | None:
        """The last call's values for logging; None before the first call.

        Reading a value, e.g. with ``.item()``, waits for the device. Nothing in the criterion does.
        """
        return self._progress.last

    def forward(
        self,
        losses: TaskLosses,
        representation: Representation,
        present: Tensor | None = None,
        positions: Positions | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Return the total loss, a scalar.

        It is float64 if a loss is, or if the regulariser is added and the representation is
        float64; else float32, for losses in 16 bits too.

        Args:
            losses: list, tuple or dict of T scalar losses, as for :func:`task_saliencies`. A loss
                that is None says that its task is absent from this batch; it is left out of the sum
                and of the regulariser. In distributed training all ranks have to use the same
                parameters, so the same tasks have to be absent on all of them.
            representation: ``(B, C, *spatial)``, or ``channel_dim`` says where the channels are;
                or :class:`Levels` of several, over which the regulariser is averaged. A task whose
                loss does not depend on a level is left out there, and so is a level that only
                absent tasks use.
                Multi-input: one per task, all of one shape. TSR and CSA then pair sample ``b`` of
                every task, and these are different images. The representation of an absent task
                may be None. ``eval()`` mode does not use it.
            present: bool ``(T, B)``, which task has a label for which sample, as for
                :func:`csa_loss`. Rows of absent tasks are ignored.
            positions: bool ``(B, *spatial)``, False where there is padding, as for
                :func:`tsr_loss`. With :class:`Levels` a list, tuple or dict with one mask (or None)
                for each.
            step: the number of the optimiser's step, at least 0. Calls in a row with the same
                number count as one for ``every``, ``start``, ``ramp`` and ``strength``: both passes
                of SAM, the closure of LBFGS, the batches of an accumulated gradient. None: every
                call is a step.

        Raises:
            ValueError, TypeError: an argument is not as described; a loss has no logarithm, with
                ``log_losses``; or in training mode :func:`task_saliencies` raises, e.g. under
                ``torch.no_grad()``.
            SecondDerivativeError: an operation between a loss and the representation has no second
                derivative; see :meth:`check`. The first call in training mode looks for them.

        Warns:
            UserWarning: a saliency's means over the channels or over the positions are zero but for
                rounding, as when a head begins with a LayerNorm. The first call looks for this too.
        """
        return self._evaluate(losses, representation, present, positions, step)[0]

    def _evaluate(
        self,
        losses: TaskLosses,
        representation: Representation,
        present: Tensor | None,
        positions: Positions | None,
        step: int | None,
    ) -> tuple[Tensor, Tasks]:
        """Return the total, and the tasks with the saliencies that were taken."""
        progress, arguments = self._progress, (losses, representation)
        group = _distributed.name_of(self.group) if self.training else ""
        with _distributed.errors_shared(group, arguments):
            options = self._checked_options()
            if step is not None:
                step = checked_step(step)
            monitor = self.monitor if self.training else None
            observer = monitor if monitor is not None and monitor.is_due(step, losses) else None
            watching = "" if observer is None else observer.group_name(group)
        turn = options.turn(progress.number(step))
        on = self.training and any(turn.lambdas)
        applied = self.training and turn.weight > 0
        # The first call with something to agree on compares options even where it is without the
        # regulariser: ranks that don't count alike, or have other options, would not meet later.
        is_shared = applied and bool(turn.lambdas[1] or options.strength)
        talks = group if is_shared or not progress.agreed or watching == group else ""
        apart = "" if observer is None or watching == talks else watching
        facts = options.facts(progress.calls) if talks else []
        facts_apart = observer.facts() if observer is not None else []
        # The same collectives in the same order on every rank, whatever is wrong on one of them.
        with (
            _distributed.meeting(apart, arguments, facts_apart),
            _distributed.meeting(talks, arguments, facts),
        ):
            tasks = Tasks(
                losses,
                representation,
                objective=options.objective,
                weights=options.task_weights,
                absent=True,
            )
            total = tasks.weighted_sum()
            record = RepMTLStep(losses=tasks.detached_losses(), total=total)
            real = has_values(total)
            if options.log_losses and real:
                check_logarithms(tasks, options.log_offset, progress.without_log)
            taken = applied or observer is not None
            scale = options.scale(total.device) if taken and real else None
            if on or observer is not None:
                tasks.place(representation)
                if applied:
                    options.check_observable(total)
                if observer is not None:
                    observer.check_observable(total)
                check_graph(tasks)
                if real and on:
                    first_calls.check_losses(tasks, progress, applied)
                csa = on and options.lambda_csa > 0
                tasks.check_batch(present, positions, options.channel_dim, csa=csa, group=group)
            if taken:
                take_saliencies(tasks, scale, create_graph=applied)
                if applied and real:
                    first_calls.warn_of_saliencies(tasks, progress, options)
            if observer is not None:
                form = observer.form(tasks, options.channel_dim)
        if talks and not torch.compiler.is_compiling():
            progress.agreed = True
        if applied:
            regularizer = Regularizer(options, turn, tasks, scale, group, progress)
            total = total + regularizer.value(record)
        if observer is not None:
            observer.observe(tasks, form, options.channel_dim, watching, progress.last_ratio)
        if monitor is not None and real:
            monitor.count(step)
        if taken and not applied:
            tasks.drop_saliencies()
        if self.training and real:
            progress.count(turn.number, step)
        # A copy: `total /= accumulation_steps` is the caller's right.
        record.total = total.detach().clone()
        progress.last = record
        return total, tasks

    def second_order(self, step: int | None = None) -> AbstractContextManager:
        """Return the context for the heads' forward pass.

        It is :func:`repmtl_kernels.second_order` if the next call will apply the regulariser, and
        does nothing if it will not::

            with criterion.second_order():
                losses = [loss(head(z), y) for head, loss, y in ...]
            criterion(losses, z).backward()

        A checkpointed function that calls ``F.relu`` after a batch norm has to enter it inside.

        Args:
            step: the ``step`` of the next call.
        """
        turn = self._checked_options().turn(self._progress.number(step))
        return second_order() if self.training and turn.weight else nullcontext()

    def _checked_options(self) -> CriterionOptions:
        options = CriterionOptions(**self.options())
        options.check()
        if not (self.monitor is None or isinstance(self.monitor, SaliencyMonitor)):
            raise TypeError(
                f"monitor: expected a SaliencyMonitor or None, got {type(self.monitor).__name__}"
            )
        return options

    def _forget_step(self) -> None:
        """Take the next call for one of another step than the last one's, whatever its number."""
        self._progress.step = None
        if self.monitor is not None:
            self.monitor.forget_step()

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, *args
    ):
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, *args
        )
        # A monitor changes no training: a criterion without one may leave its numbers behind.
        if (key := f"{prefix}monitor._extra_state") in unexpected_keys and self.monitor is None:
            unexpected_keys.remove(key)

    def get_extra_state(self) -> Tensor:
        """Return the number of calls and the running means, for ``state_dict()``."""
        # A tensor: the only type whose serialisation PyTorch keeps compatible.
        return torch.tensor(self._progress.numbers(), dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take on the state of a checkpoint."""
        self._progress.load(state.flatten().tolist())

    def _replicate_for_data_parallel(self) -> RepMTL:
        # All start from the same state, and one carries it on: their calls are one.
        replica = super()._replicate_for_data_parallel()
        replica._progress = self._progress.of_replica(replica)
        return replica
