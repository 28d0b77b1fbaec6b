"""The training criterion: task losses, their saliencies and the regulariser (eq. 3 and 10)."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from repmtl_kernels import _distributed, _preflight, _second_order
from repmtl_kernels._arguments import (
    check_csa_batch,
    check_csa_options,
    check_int,
    check_number,
    check_present,
    check_saliencies,
    check_tsr_options,
)
from repmtl_kernels._clip import Clip
from repmtl_kernels._distributed import Group, Options
from repmtl_kernels._saliency import NORMALIZERS, OVER, accumulation_dtype, is_float16
from repmtl_kernels._step import RepMTLStep
from repmtl_kernels._strength import (
    BackwardPass,
    RunningMean,
    is_transformed,
    share_below_float16,
)
from repmtl_kernels._task_losses import (
    Representation,
    TaskLosses,
    Weights,
    check_graph,
    checked_weights,
    named_losses,
    named_representations,
    per_task,
    present_of,
    take_saliencies,
    weighted_sum,
)
from repmtl_kernels.functional import csa_loss, rep_mtl_loss, tsr_loss
from repmtl_kernels.modules import _Loss

# Of a criterion that is given neither lambdas nor a strength (docs/tuning.md has the evidence), and
# of a lambda that is left out beside the other.
DEFAULT_STRENGTH = 0.03
DEFAULT_LAMBDA = 0.01
# The regulariser's gradient is taken to be at least this share of the tasks' at lambdas that sum to
# 1: where it vanishes at the representation, e.g. behind heads without curvature, no weight makes
# it the share that was asked for, and a large one would ruin the heads.
SMALLEST_RATIO = 0.01
# Elements of a saliency that are looked at for means: little memory, and a large sample.
ENOUGH = 1 << 20


def task_saliencies(losses: TaskLosses, representation: Representation) -> list[Tensor]:
    """Task saliencies ``S_t = dL_t/dZ`` of Rep-MTL, arXiv 2507.21049, eq. 3, with a graph.

    The graph makes a loss on the saliencies train encoder and heads (second order). The losses keep
    their own graph, so that they can be differentiated again.

    Args:
        losses: list, tuple or dict of T scalar losses of shape ``()``, each with its graph. Not one
            stacked tensor, and not the elements of one: each of them backpropagates zeros through
            the branches of all other tasks.
        representation: the shared representation ``Z``, the very tensor that the heads were given.
            In multi-input learning, where each task has its own batch, one tensor per task: a list
            or tuple, or a dict with the keys of ``losses`` if that is a dict.

    Returns:
        T tensors in the order of ``losses``, each of its representation's shape, dtype and device.

    Raises:
        ValueError, TypeError: an argument is not as described, a loss has no graph or does not
            depend on the representation, or gradients are disabled.
    """
    named = named_losses(losses, representation)
    representations = named_representations(representation, losses)
    check_graph(named, representations)
    return take_saliencies(named, representations)


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
            ratio grows while the tasks are learned. The ratio is observed in the backward pass of
            the total, without another one, and averaged over about the last 50 (exponential mean,
            decay 0.98): ``rho`` is held on average, single steps vary. The first call has lambdas
            that sum to ``rho``; later ones never sum to more than ``100 rho``. A backward pass that
            doesn't reach the representation, or with several gradients at a time, is not observed.
            See ``last.ratio``.
        start, ramp: the first ``start`` calls in training mode are without the regulariser, at the
            cost of the losses alone; its weight then grows linearly, and is full at the
            ``ramp``-th call after that.
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
            batch; 2 to 3 cuts the tail. The tasks' own gradients stay as they are. With CSA, the
            backward pass holds a second copy of that gradient for a moment.
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

    What is observed of the backward pass (``last.ratio``) costs each call about as many reads of
    the representation as there are tasks, and one tensor of its size in float32 or better until
    then. ``clip``, and without ``group`` ``strength``, are each process's own; both need
    ``backward()`` or ``torch.autograd.grad``: not ``torch.func`` or a compiled region around the
    criterion. For a CUDA graph, run a few calls before the capture.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    last: RepMTLStep | None
    """The last call's values for logging; None before the first. Reading a value of it, e.g. with
    ``.item()``, waits for the device; nothing in the criterion does."""

    check = staticmethod(_preflight.check)

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
        # On the host, so that no step has to ask the device whether it is its turn.
        self._calls = 0
        self._ratio = RunningMean()  # of the regulariser's gradient, at lambdas that sum to 1
        self._size = RunningMean()  # that clip compares with
        self._explained = False
        self._agreed = False  # with the other ranks, since there is something new to agree on
        self.last = None

    def forward(
        self,
        losses: TaskLosses,
        representation: Representation,
        present: Tensor | None = None,
    ) -> Tensor:
        """The total loss, a scalar: float32, also of losses in 16 bits; float64 where a loss is, or
        where the regulariser is added to it and the representation is.

        Args:
            losses: list, tuple or dict of T scalar losses, as for :func:`task_saliencies`. None in
                place of a loss: that task is absent from this batch, and left out of the sum and
                the regulariser. In distributed training all ranks have to use the same parameters,
                so the same tasks have to be absent on all of them.
            representation: ``(B, C, *spatial)``, or ``channel_dim`` says where the channels are.
                Multi-input: one per task, all of one shape; both losses then pair sample ``b`` of
                every task, which are different images there. That of an absent task may be None.
                Not used in ``eval()`` mode.
            present: bool ``(T, B)``, which task has a label for which sample, as for
                :func:`csa_loss`. Rows of absent tasks are ignored.

        Raises:
            ValueError, TypeError: an argument is not as described. In training mode also where
                :func:`task_saliencies` raises, e.g. under ``torch.no_grad()``.
            SecondDerivativeError: on the first call with the regulariser, where a head has an
                operation that is known to have no second derivative; see :meth:`check`.

        Warns:
            UserWarning: on that call too, where a saliency's means over the channels or over the
                positions are zero but for rounding, as where a head begins with a LayerNorm.
        """
        group = _distributed.name_of(self.group) if self.training else ""
        arguments = losses, representation
        with _distributed.telling(group, arguments):
            self._check_options()
        lambdas = self._lambdas()
        weight = self._weight() if self.training and any(lambdas) else 0
        talks = group if self._talks(lambdas, weight) else ""
        # The same collectives in the same order on every rank, whatever is wrong on one of them.
        with _distributed.telling(talks, arguments):
            named = named_losses(losses, representation, absent=True)
            tasks = {t: loss for t, loss in named.items() if loss is not None}
            objectives = {t: self._objective(loss) for t, loss in tasks.items()}
            weights = present_of(self._weights(losses), losses)
            total = weighted_sum(objectives, weights)
            step = RepMTLStep(losses={t: _detached(loss) for t, loss in named.items()}, total=total)
            if self.training and any(lambdas):
                representations = named_representations(representation, losses)
                zs = [z for _, z in representations]
                if weight:
                    self._check_observable(total)
                check_graph(tasks, representations)
                present = self._checked_mask(representations, present, losses, group)
                if weight:
                    first = self._explain(tasks, representations)
                    scale = self._scale(zs[0].device)
                    saliencies = take_saliencies(objectives, representations, scale)
                    if first:
                        self._warn_of_no_means(tasks, saliencies)
        if talks:
            self._agree(talks, arguments)
        if weight:
            strength = self._strength(zs[0].device, group)
            if is_float16(saliencies[0]):
                pairs = zip(tasks, saliencies, strict=True)
                step.underflow = {t: share_below_float16(s) for t, s in pairs}
            lambdas = [weight * value for value in lambdas]
            total = self._regularized(
                total, saliencies, zs, weights, present, lambdas, strength, scale, step
            )
        if self.training:
            self._calls += 1
        # A copy: `total /= accumulation_steps` is the caller's right.
        step.total = total.detach().clone()
        self.last = step
        return total

    def second_order(self) -> AbstractContextManager:
        """Context for the heads' forward: :func:`repmtl_kernels.second_order` where the next call
        will apply the regulariser, nothing where it will not::

            with criterion.second_order():
                losses = [loss(head(z), y) for head, loss, y in ...]
            criterion(losses, z).backward()

        A checkpointed function that calls ``F.relu`` after a batch norm has to enter it inside.
        """
        self._check_options()
        if self.training and any(self._lambdas()) and self._weight():
            return _second_order.second_order()
        return nullcontext()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *args):
        # A checkpoint of the model from before it had this criterion is complete without a count.
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        if (key := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(key)

    def get_extra_state(self) -> Tensor:
        # A tensor: the only type whose serialisation PyTorch keeps compatible.
        numbers = [self._calls, *self._ratio.numbers(), *self._size.numbers()]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        calls, *means = state.flatten().tolist()
        self._calls = int(calls)
        self._agreed = False
        if means:  # the first version kept the count alone
            self._ratio.load(means[:2])
            self._size.load(means[2:])

    def _check_options(self) -> None:
        """At each call too, since a schedule may have set them."""
        check_number("lambda_tsr", self.lambda_tsr, minimum=0)
        check_number("lambda_csa", self.lambda_csa, minimum=0)
        if self.strength is not None:
            check_number("strength", self.strength, minimum=0)
        check_tsr_options(
            over=self.over,
            normalizer=self.normalizer,
            temperature=self.tsr_temperature,
            floor=self.tsr_floor,
            eps=self.eps,
            prefix="tsr_",
            dtype=torch.float32,
        )
        check_csa_options(
            temperature=self.csa_temperature,
            eps=self.eps,
            group=self.group,
            memory=self.memory,
            prefix="csa_",
            dtype=torch.float32,
        )
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

    def _checked_mask(
        self,
        representations: list[tuple[str, Tensor]],
        present: Tensor | None,
        losses: TaskLosses,
        group: str,
    ) -> Tensor | None:
        """The mask's rows of the tasks that have a loss.

        On every step, so that a batch that the regulariser can't take doesn't pass for a while.
        """
        names, zs = zip(*representations, strict=True)
        first = check_saliencies(zs, self.channel_dim, "representation", names)[0]
        check_present(present, len(losses), first.shape[0], first.device)
        if present is not None and len(zs) < len(losses):
            present = torch.stack(present_of(present.unbind(), losses))
        if self.lambda_csa:
            check_csa_batch(zs, False, present, group, "representation")
        return present

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

    def _weight(self) -> float:
        """What the schedule multiplies the regulariser with on this call; 0: not its turn."""
        since = self._calls - self.start
        if since < 0 or since % self.every:
            return 0
        return self.every * (since + 1) / self.ramp if since + 1 < self.ramp else self.every

    def _talks(self, lambdas: tuple[float, float], weight: float) -> bool:
        """Whether this training call has something to tell the ranks of a group.

        The first one has even where it is without the regulariser: ranks that don't count alike, or
        have other options, would not meet later.
        """
        return not self._agreed or bool(weight and (lambdas[1] or self.strength))

    def _agree(self, group: str, near: object) -> None:
        if torch.compiler.is_compiling():  # values are not known there
            return
        options = self.options() | {
            "calls": self._calls,
            "over": OVER.index(self.over),
            "normalizer": NORMALIZERS.index(self.normalizer),
        }
        told = [-1 if options[f] is None else options[f] for f in Options._fields]
        _distributed.agree(group, Options(*told), near)
        self._agreed = True

    def _check_observable(self, total: Tensor) -> None:
        if torch.compiler.is_exporting():
            raise ValueError(
                "torch.export loses gradients that are taken inside the graph, and saliencies are "
                "such; expected RepMTL in eval() mode there. In training, export a module with "
                "RepMTLLoss that is given the saliencies"
            )
        if (self.strength is not None or self.clip is not None) and is_transformed(total):
            raise ValueError(
                "strength and clip observe the backward pass of the total, which torch.func and "
                "torch.compile hide; expected both to be None there. Compile the encoder alone, "
                "or use lambdas"
            )

    def _scale(self, device: torch.device) -> Tensor | None:
        """What the saliencies are multiplied with; stays on the device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        return self.scaler.scale(torch.ones((), dtype=torch.float32, device=device))

    def _strength(self, device: torch.device, group: str) -> float | Tensor:
        """What the lambdas are multiplied with; the same on all ranks of a group."""
        if self.strength is None:
            return 1.0
        return float(self.strength) / self._ratio.value(device, 1.0, group).clamp_min(
            SMALLEST_RATIO
        )

    def _explain(
        self, tasks: dict[Hashable, Tensor], representations: list[tuple[str, Tensor]]
    ) -> bool:
        """Once, since it walks over the graph; whether that was now."""
        if self._explained or any(is_transformed(loss) for loss in tasks.values()):
            return False
        if all(loss.grad_fn is not None for loss in tasks.values()):  # else no saliency either
            _preflight.explain(tasks, representations)
            self._explained = True
        return self._explained

    def _warn_of_no_means(self, tasks: Iterable[Hashable], saliencies: Sequence[Tensor]) -> None:
        s = saliencies[0]
        if type(s) is not Tensor or s.is_meta:  # fake ones have no values
            return
        if s.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        # Of one sample alone the means may be a single number, and that small by chance.
        some = max(1, ENOUGH // s[0].numel())
        for task, saliency in zip(tasks, saliencies, strict=True):
            for found in _preflight.without_means(saliency.detach()[:some], self.channel_dim):
                if getattr(self, found.option):
                    # Past forward and the two frames of nn.Module's call.
                    warnings.warn(f"losses[{task!r}]: {found}", stacklevel=5)

    def _regularized(
        self,
        total: Tensor,
        saliencies: list[Tensor],
        representations: list[Tensor],
        weights: list[float],
        present: Tensor | None,
        lambdas: list[float],
        strength: float | Tensor,
        scale: Tensor | None,
        step: RepMTLStep,
    ) -> Tensor:
        """``total`` plus the regulariser, and what of it goes into ``step``."""
        backward = BackwardPass()
        ratios = None if self.strength is None else self._ratio
        factor = strength * sum(lambdas)
        inputs = saliencies
        if self.clip is not None:
            inputs = Clip(float(self.clip), self._size, factor, backward)(saliencies)
        if scale is not None and (self.normalizer != "abs" or self.eps):
            inputs = [s.to(accumulation_dtype(s.dtype)) / scale for s in inputs]
        regularizer, tsr, csa = self._losses(inputs, present, *lambdas)
        if self.strength is not None:
            regularizer = strength * regularizer
        total = total + regularizer
        step.tsr, step.csa = _detached(tsr), _detached(csa)
        step.regularizer, step.applied = regularizer.detach(), True
        if not is_transformed(total):
            backward.follow(total)
            report = partial(_report, step, factor, ratios)
            backward.measure(total, representations, saliencies, weights, report, scale)
        return total

    def _losses(
        self,
        saliencies: Sequence[Tensor],
        present: Tensor | None,
        lambda_tsr: float,
        lambda_csa: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weighted regulariser, TSR and CSA; None for the one that is off."""
        shared = {"eps": self.eps, "channel_dim": self.channel_dim, "backend": self.backend}
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


def _report(
    step: RepMTLStep, factor: float | Tensor, ratios: RunningMean | None, ratio: Tensor
) -> None:
    step.ratio = ratio
    if ratios is not None:
        ratios.observe(ratio / factor)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
