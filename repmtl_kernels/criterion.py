"""The training criterion: task losses, their saliencies and the regulariser (eq. 3 and 10)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._arguments import (
    check_csa_batch,
    check_csa_options,
    check_number,
    check_present,
    check_saliencies,
    check_tsr_options,
)
from repmtl_kernels.functional import csa_loss, rep_mtl_loss, tsr_loss
from repmtl_kernels.modules import _Loss

TaskLosses = Sequence[Tensor] | Mapping[Hashable, Tensor]
Representation = Tensor | Sequence[Tensor] | Mapping[Hashable, Tensor]
Weights = Sequence[float] | Mapping[Hashable, float]

_WHY_NOT_STACKED = (
    "Every element of a stacked tensor backpropagates zeros through the branches of all other "
    "tasks; pass the list of losses that torch.stack was given"
)


class RepMTLStep(NamedTuple):
    """What the last call of :class:`RepMTL` computed: detached scalars, still on their device."""

    tsr: Tensor | None
    """TSR without its weight; None where this step did not compute it."""
    csa: Tensor | None
    """CSA without its weight; None where this step did not compute it."""
    regularizer: Tensor | None
    """What was added to the task losses, all weights included; None where nothing was."""
    losses: dict[Hashable, Tensor]
    """The task losses as they were given (no weight, no logarithm), by key or index."""
    total: Tensor
    """What the call returned."""
    applied: bool
    """Whether this step had the regulariser."""


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
    named = _named_losses(losses, representation)
    representations = _representations(representation, losses)
    _check_graph(named, representations)
    return _saliencies(named, representations)


class RepMTL(_Loss):
    """The objective of Rep-MTL, arXiv 2507.21049, eq. 10, in place of the sum of the task losses::

        criterion = RepMTL(lambda_tsr=0.01, lambda_csa=0.01)
        z = encoder(x)
        total = criterion([loss(head(z), y) for head, loss, y in ...], z)
        total.backward()

    ``sum_t w_t L_t + lambda_tsr TSR + lambda_csa CSA``. The regulariser is differentiated through
    the saliencies, so heads and whatever follows the representation need second derivatives.

    In ``eval()`` mode the result is ``sum_t w_t L_t`` alone (of the logarithms with
    ``log_losses``); it needs no graph and works under ``torch.no_grad()``.

    Args:
        lambda_tsr: weight of :func:`tsr_loss`, at least 0 (the paper: 0.7 to 1.5). Exactly 0: that
            loss is not computed. It is an attribute, and a schedule may set it.
        lambda_csa: the same for :func:`csa_loss`. CSA needs a batch of at least 2; TSR does not.
        over, normalizer, tsr_temperature: of :func:`tsr_loss`.
        csa_temperature, group: of :func:`csa_loss`.
        eps, channel_dim, backend: of both losses.
        log_losses: put ``log L_t`` in place of ``L_t``, in the sum and in the saliencies. A loss of
            exactly 0 then gives infinite or NaN totals and gradients, a negative one NaN: keep the
            losses above 0, e.g. ``L_t + 0.01``.
        task_weights: ``w_t``, finite and at least 0: a sequence, or a dict with the keys of the
            losses; None: all 1. The saliencies are those of ``L_t`` (or ``log L_t``) unweighted.
        every: apply the regulariser on every ``every``-th call in training mode, the first
            included, at ``every`` times its weight (lazy regularisation, as StyleGAN2 does with
            R1). The count is part of ``state_dict()``; a checkpoint without one leaves it as it is.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    last: RepMTLStep | None
    """The last call's values for logging; None before the first. Reading a value of it, e.g. with
    ``.item()``, waits for the device; nothing in the criterion does."""

    def __init__(
        self,
        lambda_tsr: float = 0.01,
        lambda_csa: float = 0.01,
        *,
        over: str = "tasks",
        normalizer: str = "abs",
        tsr_temperature: float = 1.0,
        csa_temperature: float = 0.5,
        eps: float = 0.0,
        log_losses: bool = False,
        task_weights: Weights | None = None,
        every: int = 1,
        channel_dim: int = 1,
        group: None = None,
        backend: str = "auto",
    ) -> None:
        check_number("lambda_tsr", lambda_tsr, minimum=0)
        check_number("lambda_csa", lambda_csa, minimum=0)
        check_tsr_options(
            over=over, normalizer=normalizer, temperature=tsr_temperature, eps=eps, prefix="tsr_"
        )
        check_csa_options(temperature=csa_temperature, eps=eps, group=group, prefix="csa_")
        if not isinstance(log_losses, bool):
            raise TypeError(f"log_losses: expected a bool, got {type(log_losses).__name__}")
        _check_every(every)
        super().__init__(
            lambda_tsr=lambda_tsr,
            lambda_csa=lambda_csa,
            over=over,
            normalizer=normalizer,
            tsr_temperature=tsr_temperature,
            csa_temperature=csa_temperature,
            eps=eps,
            log_losses=log_losses,
            task_weights=_checked_weights(task_weights),
            every=every,
            channel_dim=channel_dim,
            group=group,
            backend=backend,
        )
        # On the host, so that no step has to ask the device whether it is its turn.
        self._calls = 0
        self.last = None

    def forward(
        self,
        losses: TaskLosses,
        representation: Representation,
        present: Tensor | None = None,
    ) -> Tensor:
        """The total loss, a scalar.

        Args:
            losses: list, tuple or dict of T scalar losses, as for :func:`task_saliencies`.
            representation: ``(B, C, *spatial)``, or ``channel_dim`` says where the channels are.
                Multi-input: one per task, all of one shape; both losses then pair sample ``b`` of
                every task, which are different images there. Not used in ``eval()`` mode.
            present: bool ``(T, B)``, which task has a label for which sample, as for
                :func:`csa_loss`.

        Raises:
            ValueError, TypeError: an argument is not as described. In training mode also where
                :func:`task_saliencies` raises, e.g. under ``torch.no_grad()``.
        """
        named = _named_losses(losses, representation)
        objectives = {t: loss.log() for t, loss in named.items()} if self.log_losses else named
        total = _weighted_sum(objectives, self._weights(losses))
        tsr = csa = regularizer = None
        # Again, since a schedule may have set them.
        _check_every(self.every)
        lambda_tsr = self.every * check_number("lambda_tsr", self.lambda_tsr, minimum=0)
        lambda_csa = self.every * check_number("lambda_csa", self.lambda_csa, minimum=0)
        if self.training and (lambda_tsr or lambda_csa):
            representations = _representations(representation, losses)
            _check_graph(named, representations)
            _check_batch([z for _, z in representations], self.channel_dim, lambda_csa, present)
            if self._calls % self.every == 0:
                saliencies = _saliencies(objectives, representations)
                regularizer, tsr, csa = self._regularizer(
                    saliencies, present, lambda_tsr, lambda_csa
                )
                total = total + regularizer
        if self.training:
            self._calls += 1
        self.last = RepMTLStep(
            tsr=_detached(tsr),
            csa=_detached(csa),
            regularizer=_detached(regularizer),
            losses={t: loss.detach() for t, loss in named.items()},
            # A copy: `total /= accumulation_steps` is the caller's right.
            total=total.detach().clone(),
            applied=regularizer is not None,
        )
        return total

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *args):
        # A checkpoint of the model from before it had this criterion is complete without a count.
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        if (key := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(key)

    def get_extra_state(self) -> Tensor:
        # A tensor: the only type whose serialisation PyTorch keeps compatible.
        return torch.tensor(self._calls, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._calls = int(state)

    def _weights(self, losses: TaskLosses) -> Sequence[float]:
        if self.task_weights is None:
            return [1.0] * len(losses)
        return _per_task("task_weights", _checked_weights(self.task_weights), losses)

    def _regularizer(
        self,
        saliencies: list[Tensor],
        present: Tensor | None,
        lambda_tsr: float,
        lambda_csa: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weighted regulariser, TSR and CSA; None for the one that is off."""
        shared = {"eps": self.eps, "channel_dim": self.channel_dim, "backend": self.backend}
        of_tsr = {"over": self.over, "normalizer": self.normalizer}
        of_csa = {"present": present, "group": self.group}
        if lambda_csa == 0:
            tsr = tsr_loss(saliencies, temperature=self.tsr_temperature, **of_tsr, **shared)
            return lambda_tsr * tsr, tsr, None
        if lambda_tsr == 0:
            csa = csa_loss(saliencies, temperature=self.csa_temperature, **of_csa, **shared)
            return lambda_csa * csa, None, csa
        return rep_mtl_loss(
            saliencies,
            lambda_tsr=lambda_tsr,
            lambda_csa=lambda_csa,
            tsr_temperature=self.tsr_temperature,
            csa_temperature=self.csa_temperature,
            **of_tsr,
            **of_csa,
            **shared,
        )


def _check_every(every: int) -> None:
    if not isinstance(every, int) or isinstance(every, bool):
        raise TypeError(f"every: expected an int, got {type(every).__name__}")
    if every < 1:
        raise ValueError(f"every: expected an int of at least 1; got {every}")


def _check_batch(
    representations: list[Tensor], channel_dim: int, lambda_csa: float, present: Tensor | None
) -> None:
    """On every step, so that a batch that the regulariser can't take doesn't pass for a while."""
    first = check_saliencies(representations, channel_dim, "representation")[0]
    if lambda_csa:
        check_csa_batch(representations, False, present)
    else:
        check_present(present, len(representations), first.shape[0], first.device)


def _named_losses(losses: TaskLosses, representation: Representation) -> dict[Hashable, Tensor]:
    """The losses by key, or by index where they are a list."""
    if isinstance(losses, Tensor):
        if isinstance(representation, list | tuple | Mapping):
            raise TypeError(
                "losses: expected a list or dict of T scalar losses, got one Tensor, and "
                f"representation: expected a Tensor, got {_kind(representation)}. Are they "
                "swapped? The losses come first"
            )
        if losses.ndim == 0:
            raise TypeError(
                "losses: expected a list or dict of T scalar losses, got one scalar Tensor. Pass "
                "the loss of each task, not their sum ([loss] for a single task)"
            )
        raise TypeError(
            "losses: expected a list or dict of T scalar losses, got one Tensor of shape "
            f"{tuple(losses.shape)}. {_WHY_NOT_STACKED}"
        )
    if isinstance(losses, Mapping):
        named = dict(losses)
    elif isinstance(losses, list | tuple):
        named = dict(enumerate(losses))
    else:
        raise TypeError(
            "losses: expected a list, tuple or dict of T scalar losses; got "
            f"{type(losses).__name__}"
        )
    if not named:
        raise ValueError(f"losses: expected at least one task, got an empty {_kind(losses)}")
    for task, loss in named.items():
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"losses[{task!r}]: expected a scalar Tensor, got {type(loss).__name__}"
            )
        if loss.ndim != 0:
            remedy = ".mean() or .squeeze()" if loss.numel() == 1 else ".mean() or .sum()"
            raise ValueError(
                f"losses[{task!r}]: expected a scalar of shape (), got shape "
                f"{tuple(loss.shape)}. Reduce it with {remedy}"
            )
    return named


def _representations(
    representation: Representation, losses: TaskLosses
) -> list[tuple[str, Tensor]]:
    """Each task's representation with the name that messages use, in the order of the losses."""
    if isinstance(representation, Tensor):
        return [("representation", representation)] * len(losses)
    if not isinstance(representation, list | tuple | Mapping):
        raise TypeError(
            "representation: expected a Tensor (multi-input: a list or dict of one per task), got "
            f"{_kind(representation)}"
        )
    values = _per_task("representation", representation, losses)
    tasks = list(losses) if isinstance(losses, Mapping) else range(len(losses))
    named = [(f"representation[{t!r}]", z) for t, z in zip(tasks, values, strict=True)]
    for name, z in named:
        if not isinstance(z, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(z).__name__}")
    return named


def _per_task(name: str, values: Any, losses: TaskLosses) -> list:
    """The values in the order of the losses, which have them one for one, by key or by position."""
    if isinstance(losses, Mapping):
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{name}: losses is a dict, so expected a dict with the same keys; got "
                f"{_kind(values)}"
            )
        if values.keys() != losses.keys():
            raise ValueError(
                f"{name}: expected the keys of losses, {list(losses)}; got {list(values)}"
            )
        return [values[task] for task in losses]
    if not isinstance(values, list | tuple):
        raise TypeError(
            f"{name}: losses is a {_kind(losses)}, so expected a list or tuple with one value per "
            f"task; got {_kind(values)}"
        )
    if len(values) != len(losses):
        raise ValueError(f"{name}: expected {len(losses)}, one for each loss; got {len(values)}")
    return list(values)


def _check_graph(named: dict[Hashable, Tensor], representations: list[tuple[str, Tensor]]) -> None:
    """That saliencies can be taken, as far as it shows without taking them."""
    if not torch.is_grad_enabled():
        raise ValueError(
            "losses: saliencies are gradients, and gradients are disabled here (torch.no_grad() or "
            "torch.inference_mode()). Enable them, or call criterion.eval() on a RepMTL first: it "
            "is then the sum of the losses alone"
        )
    for name, z in representations:
        if not z.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor with requires_grad=True, got one without a graph: "
                f"{_why_no_graph(z)}. Where the encoder is frozen, call "
                "representation.requires_grad_() before the heads"
            )
    stacks = {}
    for task, loss in named.items():
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{task!r}]: expected a loss with a graph, got one without: "
                f"{_why_no_graph(loss)}"
            )
        stack = _stacked_in(loss)
        if stack is None:
            continue
        if stack in stacks:
            raise ValueError(
                f"losses[{stacks[stack]!r}] and losses[{task!r}]: expected separate losses, got "
                f"elements of one stacked tensor. {_WHY_NOT_STACKED}"
            )
        stacks[stack] = task


def _why_no_graph(value: Tensor) -> str:
    if value.is_inference():
        return "it was computed under torch.inference_mode()"
    return (
        "it was detached (.detach(), .data, torch.tensor()), computed under torch.no_grad(), or "
        "computed from tensors that need no gradient"
    )


def _stacked_in(loss: Tensor) -> torch.autograd.graph.Node | None:
    """The node of the stacked tensor that ``loss`` is an element of."""
    node = loss.grad_fn
    if node is None or not node.name().startswith(("UnbindBackward", "SelectBackward")):
        return None
    whole = node.next_functions[0][0]
    # CopySlices: losses written one by one into a tensor, `out[t] = loss`.
    stacking = ("StackBackward", "CatBackward", "CopySlices")
    return whole if whole is not None and any(s in whole.name() for s in stacking) else None


def _saliencies(
    named: dict[Hashable, Tensor], representations: list[tuple[str, Tensor]]
) -> list[Tensor]:
    saliencies = []
    for (task, loss), (name, z) in zip(named.items(), representations, strict=True):
        (saliency,) = torch.autograd.grad(loss, z, create_graph=True, allow_unused=True)
        if saliency is None:
            raise ValueError(
                f"losses[{task!r}]: does not depend on {name}. Pass the very tensor that the head "
                "of this task was given, not a copy of it; and it must not have been written in "
                "place since, e.g. by ReLU(inplace=True)" + _if_compiled(loss)
            )
        saliencies.append(saliency)
    return saliencies


def _if_compiled(loss: Tensor) -> str:
    if loss.grad_fn is None or "CompiledFunction" not in loss.grad_fn.name():
        return ""
    return (
        ". This loss is the result of a torch.compile region: if the representation is computed "
        "in the same region, no gradient passes between the two. Compile the encoder alone"
    )


def _weighted_sum(named: dict[Hashable, Tensor], weights: Sequence[float]) -> Tensor:
    terms = zip(named.values(), weights, strict=True)
    return sum(loss if weight == 1 else weight * loss for loss, weight in terms)


def _checked_weights(weights: Weights | None) -> Weights | None:
    """A copy, so that the caller's list or dict may change."""
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        return {t: check_number(f"task_weights[{t!r}]", w, minimum=0) for t, w in weights.items()}
    if isinstance(weights, list | tuple):
        return tuple(
            check_number(f"task_weights[{t}]", w, minimum=0) for t, w in enumerate(weights)
        )
    raise TypeError(
        f"task_weights: expected a list, tuple or dict of numbers, or None; got {_kind(weights)}"
    )


def _kind(value: object) -> str:
    return type(value).__name__


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
