"""The training criterion: task losses, their saliencies and the regulariser (eq. 3 and 10)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from repmtl_kernels import _distributed
from repmtl_kernels._distributed import Group, Options
from repmtl_kernels._ground.checks import checked_step
from repmtl_kernels._ground.saliency import NORMALIZERS, OVER, has_values, is_transformed
from repmtl_kernels._heads import first_calls
from repmtl_kernels._heads.preflight import preflight
from repmtl_kernels._heads.second_order import second_order
from repmtl_kernels._training.arguments import (
    Positions,
    Representation,
    TaskLosses,
    Weights,
    checked_weights,
)
from repmtl_kernels._training.options import CriterionOptions
from repmtl_kernels._training.progress import Progress
from repmtl_kernels._training.regularizer import Regularizer
from repmtl_kernels._training.saliencies import check_graph, take_saliencies
from repmtl_kernels._training.step import RepMTLStep
from repmtl_kernels._training.tasks import Tasks
from repmtl_kernels.modules import _Loss

# For a criterion that is given neither lambdas nor a strength (docs/tuning.md has the evidence).
DEFAULT_STRENGTH = 0.03
# For a lambda that is left out beside the other.
DEFAULT_LAMBDA = 0.01


def task_saliencies(
    losses: TaskLosses, representation: Representation
) -> list[Tensor] | list[list[Tensor]]:
    """Task saliencies ``S_t = dL_t/dZ`` of Rep-MTL, arXiv 2507.21049, eq. 3, with a graph.

    The graph makes a loss on the saliencies train encoder and heads (second order). The losses keep
    their own graph, so that they can be differentiated again.

    Args:
        losses: list, tuple or dict of T scalar losses of shape ``()``, each with its graph. Not one
            stacked tensor, and not the elements of one: each of them backpropagates zeros through
            the branches of all other tasks.
        representation: the shared representation ``Z``, the very tensor that the heads were given,
            or :class:`Levels` of several. In multi-input learning, where each task has its own
            batch, one (or one :class:`Levels`) per task: a list or tuple, or a dict with the keys
            of ``losses`` if that is a dict.

    Returns:
        T tensors in the order of ``losses``, each of its representation's shape, dtype and device.
        With :class:`Levels`, for each task a list with one tensor a level; zeros where the loss
        does not depend on that level. Hooks on the representation are passed by.

    Raises:
        ValueError, TypeError: an argument is not as described, a loss has no graph or does not
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


class RepMTL(_Loss):
    """The objective of Rep-MTL, arXiv 2507.21049, eq. 10, in place of the sum of the task losses::

        criterion = RepMTL()
        z = encoder(x)
        total = criterion([loss(head(z), y) for head, loss, y in ...], z)
        total.backward()

    ``sum_t w_t L_t + lambda_tsr TSR + lambda_csa CSA``. The regulariser is differentiated through
    the saliencies, so heads and whatever follows the representation need second derivatives:
    ``RepMTL.check(heads, z)`` tells whether they have them. ``with criterion.second_order():``
    around the heads makes that pass faster.

    In ``eval()`` mode the result is ``sum_t w_t L_t`` alone (of the logarithms with
    ``log_losses``); it needs no graph and works under ``torch.no_grad()``.

    With lambdas given that is equation 10 exactly. With neither lambdas nor ``strength``, the
    regulariser's gradient is held at 3 % of the tasks' (``strength=0.03``). All options are
    attributes, and a schedule may set them. What training calls have seen (their number, running
    means) is part of ``state_dict()``; a checkpoint without it leaves it as it is.

    Args:
        lambda_tsr: weight of :func:`tsr_loss`, at least 0 (the paper: 0.7 to 1.5). Exactly 0: that
            loss is not computed. None: 0.01.
        lambda_csa: the same for :func:`csa_loss`. CSA needs a batch of at least 2; TSR does not.
        strength: None (lambdas alone; 0.03 if these are None too), or ``rho`` of at least 0 (0:
            off): the norm of the regulariser's gradient at the representation is held at ``rho``
            times that of the tasks' ``sum_t w_t L_t``, and the lambdas only give the mix of TSR and
            CSA. Both losses are invariant to the scale of the losses, so with fixed lambdas that
            ratio grows while the tasks are learned. The regulariser's own gradient is taken by
            itself, on the first 16 calls that apply it and on every 24th after them, so that
            nothing else that reaches the representation counts; the mean is over about the last
            three of them (exponential, decay 0.6). ``rho`` is held on average, single steps vary.
            The lambdas never sum to more than ``100 rho``; where they come to less than ``rho /
            100``, a warning says so once (on the CPU and on CUDA). See ``last.ratio``.
        start, ramp: the first ``start`` calls in training mode are without the regulariser, at the
            cost of the losses alone; its weight then grows linearly, and is full at the
            ``ramp``-th call after that. Calls that are given the same ``step`` count as one.
        over, normalizer, tsr_temperature, tsr_floor: of :func:`tsr_loss`.
        csa_temperature: of :func:`csa_loss`.
        group: of :func:`csa_loss`: all ranks give negatives. The weight of the regulariser with
            ``strength`` is then the same on all of them, from the mean over their observations.
        memory: of :func:`csa_loss`: ``"auto"``, ``"save"`` or ``"recompute"``.
        eps, channel_dim, backend: of both losses.
        log_losses: put ``log L_t`` in place of ``L_t``, in the sum and in the saliencies. A loss of
            exactly 0 then gives infinite or NaN totals and gradients, a negative one NaN: keep the
            losses above 0, or give an offset.
        log_offset: of ``log_losses``, at least 0: ``log(L_t + log_offset)``, e.g. 0.01. It bounds
            the weight ``1 / (L_t + log_offset)`` of a task that is nearly learned.
        clip: None, or a number above 0: where ``|dR/dS| |S|``, the scale-free size of the
            regulariser's gradient over the saliencies of all tasks, is more than ``clip`` times its
            running mean (decay 0.98, of the unclipped sizes before this one), that gradient is
            scaled down to it, for heads and encoder alike. TSR's is heavy-tailed from batch to
            batch; 2 to 3 cuts the tail. The tasks' own gradients stay as they are. ``dR/dS`` is
            then computed in the call, and kept for the backward pass in place of what CSA keeps.
        task_weights: ``w_t``, finite and at least 0: a sequence, or a dict with the keys of the
            losses; None: all 1. The saliencies are those of ``L_t`` (or ``log L_t``) unweighted.
        scaler: None, or the ``torch.amp.GradScaler`` that scales the total, for float16. The
            saliencies are then those of the losses times its scale, so that they do not underflow.
            TSR and CSA do not depend on it, and the total is not scaled; with ``"softmax"`` or
            ``eps`` the scale is divided out in float32. Where scaled saliencies overflow the total
            is NaN, and the scaler skips that step as any other with infinite gradients. Without it
            watch ``last.underflow``. ``copy.deepcopy`` keeps it; a pickled criterion has a copy:
            set ``criterion.scaler`` to the one that you update.
        every: apply the regulariser on every ``every``-th call in training mode, the first
            included, at ``every`` times its weight (lazy regularisation, as StyleGAN2 does with
            R1): with ``strength`` the mean over all calls is ``rho``.

    A measurement of the ratio is one more backward pass through the heads; with wide ASPP heads it
    costs 1.3 % of a step on average, without ``second_order()`` 2.3 %. ``clip``, and without
    ``group`` ``strength``, are each process's own. Both keep running means, which ``torch.func``
    and compiled regions around the criterion don't allow. A CUDA graph has no measurements in it:
    run 16 calls before the capture, and where the weight is to follow the training, one without the
    graph now and then. Replicas that ``nn.DataParallel`` makes count as one; the first of them
    carries the criterion's state and ``last`` on. Calls on meta or fake tensors (dry runs) leave
    the state as it was.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

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
        every: int = 1,
        channel_dim: int = 1,
        group: Group | None = None,
        memory: str = "auto",
        backend: str = "auto",
    ) -> None:
        if lambda_tsr is None and lambda_csa is None and strength is None:
            strength = DEFAULT_STRENGTH
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
            channel_dim=channel_dim,
            group=group,
            memory=memory,
            backend=backend,
        )
        super().__init__(**vars(options))
        options.check()
        self._progress = Progress()

    @property
    def last(self) -> RepMTLStep | None:
        """The last call's values for logging; None before the first. Reading a value of it, e.g.
        with ``.item()``, waits for the device; nothing in the criterion does."""
        return self._progress.last

    def forward(
        self,
        losses: TaskLosses,
        representation: Representation,
        present: Tensor | None = None,
        positions: Positions | None = None,
        step: int | None = None,
    ) -> Tensor:
        """The total loss, a scalar: float32, also of losses in 16 bits; float64 where a loss is, or
        where the regulariser is added to it and the representation is.

        Args:
            losses: list, tuple or dict of T scalar losses, as for :func:`task_saliencies`. None in
                place of a loss: that task is absent from this batch, and left out of the sum and
                the regulariser. In distributed training all ranks have to use the same parameters,
                so the same tasks have to be absent on all of them.
            representation: ``(B, C, *spatial)``, or ``channel_dim`` says where the channels are;
                or :class:`Levels` of several, over which the regulariser is averaged. A task whose
                loss does not depend on a level is left out there, and so is a level that only
                absent tasks use.
                Multi-input: one per task, all of one shape; both losses then pair sample ``b`` of
                every task, which are different images there. That of an absent task may be None.
                Not used in ``eval()`` mode.
            present: bool ``(T, B)``, which task has a label for which sample, as for
                :func:`csa_loss`. Rows of absent tasks are ignored.
            positions: bool ``(B, *spatial)``, the positions that are there and not padding, as for
                :func:`tsr_loss`. With :class:`Levels` a list, tuple or dict with one for each, some
                of which may be None.
            step: the number of the optimiser's step, at least 0. Calls in a row with the same one
                count as one for ``every``, ``start``, ``ramp`` and ``strength``: both passes of
                SAM, the closure of LBFGS, the batches of an accumulated gradient. None: every call
                is a step.

        Raises:
            ValueError, TypeError: an argument is not as described. In training mode also where
                :func:`task_saliencies` raises, e.g. under ``torch.no_grad()``.
            SecondDerivativeError: on the first call in training mode, where an operation between a
                loss and the representation has no second derivative; see :meth:`check`.

        Warns:
            UserWarning: on that call too, where a saliency's means over the channels or over the
                positions are zero but for rounding, as where a head begins with a LayerNorm.
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
        with _distributed.telling(group, arguments):
            options = self._checked_options()
            if step is not None:
                step = checked_step(step)
        turn = options.turn(progress.number(step))
        on = self.training and any(turn.lambdas)
        applied = self.training and turn.weight > 0
        # The first call with something to agree on compares options even where it is without the
        # regulariser: ranks that don't count alike, or have other options, would not meet later.
        is_shared = applied and bool(turn.lambdas[1] or options.strength)
        talks = group if is_shared or not progress.agreed else ""
        # The same collectives in the same order on every rank, whatever is wrong on one of them.
        with _distributed.telling(talks, arguments):
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
            scale = options.scale(total.device) if applied and real else None
            if on:
                tasks.place(representation)
                if applied:
                    _check_observable(options, total)
                check_graph(tasks)
                if real:
                    first_calls.explain(tasks, progress, applied)
                tasks.check_batch(
                    present,
                    positions,
                    channel_dim=options.channel_dim,
                    contrasted=bool(options.lambda_csa),
                    group=group,
                )
            if applied:
                take_saliencies(tasks, scale)
                if real:
                    first_calls.warn_of_no_means(tasks, progress, options)
        if talks:
            self._agree(options, talks, arguments)
        if applied:
            regularizer = Regularizer(options, turn, tasks, scale, group, progress)
            total = total + regularizer.value(record)
        if self.training and real:
            progress.count(turn.number, step)
        # A copy: `total /= accumulation_steps` is the caller's right.
        record.total = total.detach().clone()
        progress.last = record
        return total, tasks

    def second_order(self, step: int | None = None) -> AbstractContextManager:
        """Context for the heads' forward: :func:`repmtl_kernels.second_order` where the next call
        will apply the regulariser, nothing where it will not::

            with criterion.second_order():
                losses = [loss(head(z), y) for head, loss, y in ...]
            criterion(losses, z).backward()

        A checkpointed function that calls ``F.relu`` after a batch norm has to enter it inside.

        Args:
            step: what the next call will be given as ``step``.
        """
        turn = self._checked_options().turn(self._progress.number(step))
        return second_order() if self.training and turn.weight else nullcontext()

    def _checked_options(self) -> CriterionOptions:
        options = CriterionOptions(**self.options())
        options.check()
        return options

    def _agree(self, options: CriterionOptions, group: str, arguments: object) -> None:
        if torch.compiler.is_compiling():  # values are not known there
            return
        compared = options.compared() | {
            "calls": self._progress.calls,
            "over": OVER.index(self.over),
            "normalizer": NORMALIZERS.index(self.normalizer),
        }
        sent = [-1 if compared[name] is None else compared[name] for name in Options._fields]
        _distributed.agree(group, Options(*sent), arguments)
        self._progress.agreed = True

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *args):
        # A checkpoint of the model from before it had this criterion is complete without a count.
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        if (key := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(key)

    def get_extra_state(self) -> Tensor:
        # A tensor: the only type whose serialisation PyTorch keeps compatible.
        return torch.tensor(self._progress.numbers(), dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._progress.load(state.flatten().tolist())

    def _replicate_for_data_parallel(self) -> RepMTL:
        # All start from the same state, and one carries it on: their calls are one.
        replica = super()._replicate_for_data_parallel()
        replica._progress = self._progress.of_replica(replica)
        return replica


def _check_observable(options: CriterionOptions, total: Tensor) -> None:
    """Raise where gradients that are taken in the call, or running means, would be lost."""
    if torch.compiler.is_exporting():
        raise ValueError(
            "torch.export loses gradients that are taken inside the graph, and saliencies are "
            "such; expected RepMTL in eval() mode there. In training, export a module with "
            "RepMTLLoss that is given the saliencies"
        )
    if options.keeps_means and is_transformed(total):
        raise ValueError(
            "strength and clip keep running means, which torch.func and torch.compile would "
            "lose; expected both to be None there. Compile the encoder alone, or use lambdas"
        )
