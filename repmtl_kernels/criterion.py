"""The training criterion: task losses, their saliencies and the regulariser (eq. 3 and 10)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_kernels import _distributed
from repmtl_kernels._distributed import Fact, Group, check_group
from repmtl_kernels._ground.checks import check_int, check_number, checked_step
from repmtl_kernels._ground.saliency import accumulation_dtype, has_values, is_float16
from repmtl_kernels._heads import second_order as _second_order
from repmtl_kernels._heads.preflight import preflight
from repmtl_kernels._losses.arguments import (
    check_csa_batch,
    check_positions,
    check_present,
    check_saliencies,
)
from repmtl_kernels._losses.options import CsaOptions, TsrOptions, facts
from repmtl_kernels._training.clip import clipped
from repmtl_kernels._training.progress import Progress
from repmtl_kernels._training.step import RepMTLStep
from repmtl_kernels._training.strength import (
    gradient_ratio,
    is_measured,
    is_transformed,
    share_below_float16,
)
from repmtl_kernels._training.tasks import (
    Positions,
    Representation,
    Task,
    TaskLosses,
    Weights,
    at_each_level,
    check_graph,
    checked_weights,
    named_losses,
    per_task,
    place,
    take_saliencies,
    weighted_sum,
)
from repmtl_kernels.functional import csa_loss, rep_mtl_loss, tsr_loss
from repmtl_kernels.modules import LossModule

# For a criterion that is given neither lambdas nor a strength (docs/tuning.md has the evidence).
DEFAULT_STRENGTH = 0.03
# For a lambda that is left out beside the other.
DEFAULT_LAMBDA = 0.01
# The regulariser's gradient is taken to be at least this share of the tasks' at lambdas that sum to
# 1: where it vanishes at the representation, e.g. behind heads without curvature, no weight makes
# it the share that was asked for, and a large one would ruin the heads.
SMALLEST_RATIO = 0.01
# The weight that makes the regulariser's gradient so much smaller than lambdas that sum to
# `strength` is reported: at least this many times.
LARGEST_RATIO = 100.0
# The options of the criterion itself that all ranks of a group must share.
COMPARED = (
    "lambda_tsr",
    "lambda_csa",
    "strength",
    "start",
    "ramp",
    "every",
    "log_losses",
    "log_offset",
    "clip",
)
# Elements of a saliency that are looked at for means: little memory, and a large sample.
ENOUGH = 1 << 20


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
    named = named_losses(losses, representation)
    tasks = [Task(key, row, loss, loss) for row, (key, loss) in enumerate(named.items())]
    levels = place(tasks, representation, losses)
    check_graph(tasks)
    take_saliencies(tasks)
    if levels is None:
        return [task.saliencies[0] for task in tasks]
    return [
        [
            torch.zeros_like(z) if saliency is None else saliency
            for z, saliency in zip(task.representations, task.saliencies, strict=True)
        ]
        for task in tasks
    ]


@dataclass(eq=False)
class _Call:
    """A call with the regulariser, as its parts need to know it."""

    tasks: list[Task]
    number: int
    step: RepMTLStep
    lambdas: tuple[float, float]  # with the weight that the schedule gives them
    present: Tensor | None  # the rows of all tasks, absent ones too
    positions: list[Tensor | None]  # at each level
    scale: Tensor | None  # what the saliencies have been multiplied with
    group: str


class RepMTL(LossModule):
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
        super().__init__(
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
        self._check_options()
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
    ) -> tuple[Tensor, list[Task]]:
        """The total, and the tasks with the saliencies that were taken."""
        group = _distributed.name_of(self.group) if self.training else ""
        arguments = losses, representation
        with _distributed.errors_shared(group, arguments):
            self._check_options()
            if step is not None:
                step = checked_step(step)
        lambdas = self._lambdas()
        number = self._progress.number(step)
        on = self.training and any(lambdas)
        weight = self._weight(number) if on else 0
        talks = group if self._talks(lambdas, weight) else ""
        # The same collectives in the same order on every rank, whatever is wrong on one of them.
        with _distributed.errors_shared(talks, arguments):
            named = named_losses(losses, representation, absent=True)
            weights = self._weights(losses)
            tasks = [
                Task(key, row, loss, self._objective(loss), weights[row])
                for row, (key, loss) in enumerate(named.items())
                if loss is not None
            ]
            total = weighted_sum(tasks)
            record = RepMTLStep(
                losses={t: _detached(loss) for t, loss in named.items()}, total=total
            )
            real = has_values(total)
            if on:
                levels = place(tasks, representation, losses)
                if weight:
                    self._check_observable(total)
                check_graph(tasks)
                if real:
                    self._explain(tasks, bool(weight))
                masks = self._checked_batch(
                    tasks, present, at_each_level(positions, levels), len(named), group
                )
                if weight:
                    scale = self._scale(total.device) if real else None
                    take_saliencies(tasks, scale, some_absent=len(tasks) < len(named))
                    if real:
                        self._warn_of_no_means(tasks)
        if talks:
            self._agree(talks, arguments)
        if weight:
            weighted = tuple(weight * value for value in lambdas)
            call = _Call(tasks, number, record, weighted, present, masks, scale, group)
            total = total + self._regularizer(call)
        if self.training and real:
            self._progress.count(number, step)
        # A copy: `total /= accumulation_steps` is the caller's right.
        record.total = total.detach().clone()
        self._progress.last = record
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
        self._check_options()
        if self.training and any(self._lambdas()) and self._weight(self._progress.number(step)):
            return _second_order.second_order()
        return nullcontext()

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

    def _check_options(self) -> None:
        """At each call too, since a schedule may have set them."""
        check_number("lambda_tsr", self.lambda_tsr, minimum=0)
        check_number("lambda_csa", self.lambda_csa, minimum=0)
        if self.strength is not None:
            check_number("strength", self.strength, minimum=0)
        self._tsr_options().check(TsrOptions.prefix, torch.float32)
        self._csa_options().check(CsaOptions.prefix, torch.float32)
        check_group(self.group)
        if not isinstance(self.log_losses, bool):
            raise TypeError(f"log_losses: expected a bool, got {type(self.log_losses).__name__}")
        log_offset = check_number("log_offset", self.log_offset, minimum=0)
        if log_offset and not self.log_losses:
            raise ValueError(
                "log_offset: it is added to the losses before their logarithm; expected 0 without "
                f"log_losses=True, got {log_offset!r}"
            )
        if self.clip is not None:
            check_number("clip", self.clip, minimum=0, exclusive=True)
        if not (self.scaler is None or isinstance(self.scaler, torch.amp.GradScaler)):
            raise TypeError(
                f"scaler: expected a torch.amp.GradScaler or None, got {type(self.scaler).__name__}"
            )
        check_int("start", self.start, minimum=0)
        check_int("ramp", self.ramp, minimum=0)
        check_int("every", self.every, minimum=1)

    def _tsr_options(self) -> TsrOptions:
        return TsrOptions(
            self.over, self.normalizer, self.tsr_temperature, self.tsr_floor, self.eps
        )

    def _csa_options(self) -> CsaOptions:
        return CsaOptions(self.csa_temperature, self.eps, self.memory)

    def _checked_batch(
        self,
        tasks: list[Task],
        present: Tensor | None,
        masks: list[tuple[str, Tensor | None]],
        count: int,
        group: str,
    ) -> list[Tensor | None]:
        """The masks of positions, without the names that messages use.

        On every step, so that a batch that the regulariser can't take doesn't pass for a while.
        """
        places = tasks[0].places
        batch = places[0][1].shape[:1]
        for level, ((_, first), (name, mask)) in enumerate(zip(places, masks, strict=True)):
            names, zs = zip(*(task.places[level] for task in tasks), strict=True)
            check_saliencies(zs, self.channel_dim, "representation", names)
            if first.shape[:1] != batch:
                raise ValueError(
                    f"{names[0]}: expected the batch of {places[0][0]}, {batch[0]}; got "
                    f"{first.shape[0]}"
                )
            check_present(present, count, first.shape[0], first.device)
            check_positions(mask, first, self.channel_dim, name)
            if self.lambda_csa:
                check_csa_batch(zs, False, None, group, "representation")
        return [mask for _, mask in masks]

    def _weights(self, losses: TaskLosses) -> Sequence[float]:
        if self.task_weights is None:
            return [1.0] * len(losses)
        return per_task("task_weights", checked_weights(self.task_weights), losses)

    def _objective(self, loss: Tensor) -> Tensor:
        if loss.is_floating_point():  # a sum or a logarithm in 16 bits would lose what there is
            loss = loss.to(accumulation_dtype(loss.dtype))
        if not self.log_losses:
            return loss
        return (loss + float(self.log_offset) if self.log_offset else loss).log()

    def _lambdas(self) -> tuple[float, float]:
        """The weights of TSR and CSA; with ``strength`` only their mix, which sums to 1."""
        both = float(self.lambda_tsr), float(self.lambda_csa)
        if self.strength is None:
            return both
        total = sum(both)
        return tuple(value / total for value in both) if self.strength and total else (0.0, 0.0)

    def _weight(self, number: int) -> float:
        """What the schedule multiplies the regulariser with on this call; 0: not its turn."""
        since = number - self.start
        if since < 0 or since % self.every:
            return 0
        return self.every * (since + 1) / self.ramp if since + 1 < self.ramp else self.every

    def _talks(self, lambdas: tuple[float, float], weight: float) -> bool:
        """Whether this training call has something to tell the ranks of a group.

        The first one has even where it is without the regulariser: ranks that don't count alike, or
        have other options, would not meet later.
        """
        return not self._progress.agreed or bool(weight and (lambdas[1] or self.strength))

    def _agree(self, group: str, like: object) -> None:
        if torch.compiler.is_compiling():  # values are not known there
            return
        calls = Fact(
            self._progress.calls,
            "the same number of training calls before this one",
            remedy=". Load the checkpoint on every rank, not on one, and skip a batch on all",
        )
        options = self._tsr_options(), self._csa_options()
        compared = [calls, *facts(*options).values()]
        compared += [Fact(getattr(self, name), f"the same {name}") for name in COMPARED]
        _distributed.agree(group, compared, like)
        self._progress.agreed = True

    def _check_observable(self, total: Tensor) -> None:
        if torch.compiler.is_exporting():
            raise ValueError(
                "torch.export loses gradients that are taken inside the graph, and saliencies are "
                "such; expected RepMTL in eval() mode there. In training, export a module with "
                "RepMTLLoss that is given the saliencies"
            )
        if (self.strength is not None or self.clip is not None) and is_transformed(total):
            raise ValueError(
                "strength and clip keep running means, which torch.func and torch.compile would "
                "lose; expected both to be None there. Compile the encoder alone, or use lambdas"
            )

    def _scale(self, device: torch.device) -> Tensor | None:
        """What the saliencies are multiplied with; stays on the device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        return self.scaler.scale(torch.ones((), dtype=torch.float32, device=device))

    def _explain(self, tasks: list[Task], applied: bool) -> None:
        """Once for each task, since it takes all derivatives."""
        explained = self._progress.explained
        if all(task.key in explained for task in tasks):
            return
        if any(is_transformed(task.loss) for task in tasks):
            return
        if all(task.loss.grad_fn is not None for task in tasks):  # else no saliency either
            new = [task for task in tasks if task.key not in explained]
            if preflight.explain(new, tasks, applied):
                explained.update(task.key for task in new)

    def _warn_of_no_means(self, tasks: list[Task]) -> None:
        """Once for each task, since it waits for the device."""
        looked_at = self._progress.looked_at
        if all(task.key in looked_at for task in tasks) or is_transformed(tasks[0].loss):
            return
        if tasks[0].loss.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        new = [task for task in tasks if task.key not in looked_at]
        looked_at.update(task.key for task in new)
        for task in new:
            for saliency in task.saliencies:
                if saliency is None:
                    continue
                saliency = saliency.detach()
                # One sample's means may be a single number, and that small by chance.
                some = max(1, ENOUGH // saliency[0].numel())
                for found in preflight.without_means(saliency[:some], self.channel_dim):
                    if getattr(self, found.option):
                        # Past forward and the two frames of nn.Module's call.
                        warnings.warn(f"losses[{task.key!r}]: {found}", stacklevel=6)

    def _regularizer(self, call: _Call) -> Tensor:
        """The term that is added to the tasks; the step's record gets its parts."""
        saliencies = [[s for s in level if s is not None] for level in _by_level(call.tasks)]
        flat = [s for level in saliencies for s in level]
        if is_float16(flat[0]):
            call.step.underflow = {
                task.key: share_below_float16([s for s in task.saliencies if s is not None])
                for task in call.tasks
            }
        if self.clip is None:
            value, (tsr, csa) = self._losses(flat, call)
        else:
            value, (tsr, csa) = clipped(
                lambda leaves: self._losses(leaves, call),
                flat,
                limit=float(self.clip),
                mean=self._progress.size,
                factor=sum(call.lambdas),
                scale=call.scale,
            )
        call.step.tsr, call.step.csa = _detached(tsr), _detached(csa)
        measured = self._measured(value, call)
        if self.strength is not None:
            strength = self._strength(value, call.group, measured is not None)
            value = strength * value
            if measured is not None:
                measured = measured * strength
        if measured is not None and has_values(measured):
            self._progress.last_ratio = measured
        call.step.ratio = self._progress.last_ratio if measured is None else measured
        call.step.regularizer, call.step.applied = value.detach(), True
        return value

    def _measured(self, value: Tensor, call: _Call) -> Tensor | None:
        """The ratio of the gradients without ``strength``, where it is this call's turn."""
        progress, real = self._progress, has_values(value)
        if is_transformed(value) or call.number < progress.calls:  # another call of its step
            return None
        if not is_measured((call.number - self.start) // self.every):
            return None
        capturing = value.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing and not progress.ratio.is_empty:
            return None
        ratio = gradient_ratio(value, call.tasks, call.scale)
        if real:
            progress.ratio.observe(ratio / sum(call.lambdas))
        return ratio

    def _strength(self, value: Tensor, group: str, measured: bool) -> float | Tensor:
        """The factor on the lambdas; the same on all ranks of a group."""
        if not has_values(value):
            return float(self.strength)
        progress = self._progress
        ratio = progress.ratio.value(value.device, 1.0, group)
        if measured and not progress.warned and progress.alarm.rings(ratio > LARGEST_RATIO):
            progress.warned = True
            warnings.warn(
                f"strength: the lambdas have fallen below a hundredth of {self.strength:g}, since "
                "the tasks' gradient at the representation is less than a hundredth of the "
                "regulariser's at lambdas that sum to 1. Are the tasks learned? docs/tuning.md has "
                "more",
                stacklevel=7,
            )
        return float(self.strength) / ratio.clamp_min(SMALLEST_RATIO)

    def _losses(
        self, saliencies: Sequence[Tensor], call: _Call
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """The weighted regulariser, TSR and CSA, as means over the levels; None where one is off.

        ``saliencies``: all that there are, level by level.
        """
        if call.scale is not None and (self.normalizer != "abs" or self.eps):
            saliencies = [s.to(accumulation_dtype(s.dtype)) / call.scale for s in saliencies]
        remaining = iter(saliencies)
        found = []
        for level, mask in zip(_by_level(call.tasks), call.positions, strict=True):
            tasks = [t for t, s in zip(call.tasks, level, strict=True) if s is not None]
            if not tasks:  # those that use it are absent
                continue
            present = call.present
            if present is not None and len(tasks) < len(present):
                present = torch.stack([present[task.row] for task in tasks])
            some = [next(remaining) for _ in tasks]
            found.append(self._losses_of_level(some, present, mask, *call.lambdas))
        if len(found) == 1:
            value, *parts = found[0]
            return value, tuple(parts)
        value, *parts = (
            None if values[0] is None else torch.stack(values).mean()
            for values in zip(*found, strict=True)
        )
        return value, tuple(parts)

    def _losses_of_level(
        self,
        saliencies: Sequence[Tensor],
        present: Tensor | None,
        positions: Tensor | None,
        lambda_tsr: float,
        lambda_csa: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        shared = {
            "eps": self.eps,
            "positions": positions,
            "channel_dim": self.channel_dim,
            "backend": self.backend,
        }
        of_tsr = {"over": self.over, "normalizer": self.normalizer}
        tsr_options = {"temperature": self.tsr_temperature, "floor": self.tsr_floor}
        of_csa = {"present": present, "group": self.group, "memory": self.memory}
        if lambda_csa == 0:
            tsr = tsr_loss(saliencies, **tsr_options, **of_tsr, **shared)
            return lambda_tsr * tsr, tsr, None
        if lambda_tsr == 0:
            csa = csa_loss(saliencies, temperature=self.csa_temperature, **of_csa, **shared)
            return lambda_csa * csa, None, csa
        return rep_mtl_loss(
            saliencies,
            lambda_tsr=lambda_tsr,
            lambda_csa=lambda_csa,
            tsr_temperature=self.tsr_temperature,
            tsr_floor=self.tsr_floor,
            csa_temperature=self.csa_temperature,
            **of_tsr,
            **of_csa,
            **shared,
        )


def _by_level(tasks: Sequence[Task]) -> list[tuple[Tensor | None, ...]]:
    """The saliencies of all tasks at each level."""
    return list(zip(*(task.saliencies for task in tasks), strict=True))


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
