"""Rep-MTL with Hugging Face's ``Trainer``: finetuning, with PEFT and Accelerate.

::

    encoder = AutoModel.from_pretrained(...)
    model = RepMTLModel(
        encoder,
        heads={"upos": nn.Linear(encoder.config.hidden_size, 17), "deprel": ...},
        losses={"upos": token_cross_entropy, "deprel": token_cross_entropy},
    )
    RepMTLTrainer(model, TrainingArguments(...), train_dataset=..., data_collator=...).train()

A model of your own, e.g. a ``PreTrainedModel``, works with :class:`RepMTLTrainer` too: it calls its
criterion in its ``forward``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from repmtl_kernels._monitor.state import as_text, from_text
from repmtl_kernels._training.levels import Levels, levels_of
from repmtl_kernels._training.step import RepMTLStep
from repmtl_kernels.criterion import RepMTL

# A class that cross_entropy and the library's collators leave out.
UNLABELLED = -100


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of all tokens that have a label.

    Args:
        logits: ``(B, N, K)`` of ``K`` classes, as a linear head on tokens returns them.
        labels: classes ``(B, N)``; -100 where a token has none.

    Returns:
        A scalar; 0 if no token has a label.

    Raises:
        ValueError: the shapes are not as described.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            "labels: expected shape (B, N) beside logits of shape (B, N, K); got "
            f"{tuple(labels.shape)} beside {tuple(logits.shape)}"
        )
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED, reduction="sum"
    )
    return total / (labels != UNLABELLED).sum().clamp_min(1)


class RepMTLModel(nn.Module):
    """An encoder and the heads of its tasks, whose ``loss`` is the total of :class:`RepMTL`.

    It takes what the encoder takes, and the targets by the names of their tasks::

        model(input_ids=..., attention_mask=..., upos=..., deprel=...)

    The result is a dict: ``logits`` has the predictions by task, and ``loss`` the total if there
    are targets. In ``eval()`` mode that is the weighted sum of the task losses, and works under
    ``torch.no_grad()``. A task whose target is None or missing is absent from this batch. A sample
    all of whose labels of a task are -100 is without a label of it, and CSA leaves it out there.
    This is for integer targets with the batch as their first dimension; of other targets all
    samples have a label.

    If the encoder returns tokens ``(B, N, C)``, an ``attention_mask`` of shape ``(B, N)`` says
    which of them are padding, and the regulariser leaves these out. A subclass whose mask is
    another one overrides :meth:`positions`.

    Losses and criterion are within ``forward``, since a model that Accelerate prepares for mixed
    precision, or DDP wraps, returns copies. The criterion is a submodule: ``model.eval()`` switches
    it too. With ``torch.compile`` the encoder is compiled, and the heads are not.

    LoRA goes around the encoder, ``get_peft_model(encoder, LoraConfig(...))``, or around this
    model. In the latter case checkpoints have the adapters and the heads alone::

        heads = [f"heads.{task}" for task in model.heads]
        get_peft_model(model, LoraConfig(target_modules=["query", "value"], modules_to_save=heads))

    Args:
        encoder: returns the shared representation: a Tensor, :class:`Levels`, or an output with
            ``last_hidden_state``, as the models of transformers do.
        heads: one module per task, from the representation to the prediction.
        losses: one callable per task, ``loss(prediction, target)``, a scalar; for tokens
            :func:`token_cross_entropy`.
        criterion: None: ``RepMTL(channel_dim=-1)``.

    Raises:
        ValueError: ``heads`` and ``losses`` are not of the same tasks, or a task has the name
            ``step``.
    """

    # For the Trainer: the losses are means over a batch, and not over those of a whole step.
    accepts_loss_kwargs = False

    def __init__(
        self,
        encoder: nn.Module,
        heads: Mapping[str, nn.Module],
        losses: Mapping[str, Callable[[Any, Any], Tensor]],
        criterion: RepMTL | None = None,
    ) -> None:
        super().__init__()
        if heads.keys() != losses.keys():
            raise ValueError(f"losses: expected the tasks of heads, {[*heads]}; got {[*losses]}")
        if "step" in heads:
            raise ValueError("heads: expected names of tasks other than 'step', which forward has")
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)
        self.criterion = RepMTL(channel_dim=-1) if criterion is None else criterion
        self.losses = dict(losses)
        # Losses that are modules, e.g. with class weights, move to the device and into checkpoints.
        self.loss_modules = nn.ModuleDict(
            {task: loss for task, loss in losses.items() if isinstance(loss, nn.Module)}
        )

    def forward(self, *, step: int | None = None, **batch: Any) -> dict[str, Any]:
        """Return ``logits``, and ``loss`` if there are targets.

        Args:
            step: the number of the optimiser's step, for the criterion.
            batch: the inputs of the encoder and the targets.

        Raises:
            ValueError, TypeError: the encoder's output or ``attention_mask`` is not as described,
                or :class:`RepMTL` raises.
        """
        targets = {task: batch.pop(task, None) for task in self.heads}
        output = self.encoder(**batch)
        z = getattr(output, "last_hidden_state", output)
        if not isinstance(z, Tensor | Levels):
            raise TypeError(
                "encoder: expected a Tensor, Levels, or an output with last_hidden_state; got "
                f"{type(output).__name__}"
            )
        return self._heads(z, targets, self.positions(z, batch), step)

    def positions(
        self, representation: Tensor | Levels, inputs: Mapping[str, Any]
    ) -> Tensor | list[Tensor | None] | None:
        """Return which positions are no padding; None: all.

        Args:
            representation: the encoder's.
            inputs: the batch without the targets.

        Returns:
            ``attention_mask`` as bool, for tokens ``(B, N, C)``; with :class:`Levels` of tokens one
            for each.

        Raises:
            ValueError: the mask does not belong to these tokens, or the criterion takes another
                dimension for the channels.
        """
        mask = inputs.get("attention_mask")
        if mask is None:
            return None
        if isinstance(representation, Levels):
            return [self._mask(mask, z) for z in representation]
        return self._mask(mask, representation)

    def _mask(self, mask: Tensor, z: Tensor) -> Tensor | None:
        if z.ndim != 3:  # one vector a sample, or a map of an image
            return None
        if mask.shape != z.shape[:2]:
            raise ValueError(
                f"attention_mask: expected shape (B, N) = {tuple(z.shape[:2])}, that of the "
                f"encoder's tokens; got {tuple(mask.shape)}. A subclass of RepMTLModel may "
                "override positions"
            )
        if self.criterion.channel_dim not in (-1, 2):
            raise ValueError(
                "criterion: expected channel_dim=-1 for tokens (B, N, C); got channel_dim="
                f"{self.criterion.channel_dim}"
            )
        return mask.bool()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Let the encoder keep fewer activations; the Trainer's option of this name calls it."""
        enable: Any = self.encoder.activation_checkpointing_enable
        enable(**options)

    # A compiler would take saliencies of results of its own region, which have no graph in between.
    @torch.compiler.disable
    def _heads(
        self,
        z: Tensor | Levels,
        targets: Mapping[str, Any],
        positions: Tensor | list[Tensor | None] | None,
        step: int | None,
    ) -> dict[str, Any]:
        with self.criterion.second_order(step):
            logits = {task: head(z) for task, head in self.heads.items()}
            losses = {
                task: None if target is None else self.losses[task](logits[task], target)
                for task, target in targets.items()
            }
        if not self.training and all(loss is None for loss in losses.values()):
            return {"logits": logits}
        present = _labelled([*targets.values()], levels_of(z)[0].shape[0])
        loss = self.criterion(losses, z, present, positions=positions, step=step)
        return {"loss": loss, "logits": logits}


def _labelled(targets: list[Any], size: int) -> Tensor | None:
    """Return which sample has a label of which task, ``(T, B)``; None if no target says so."""
    rows = [_samples(target, size) for target in targets]
    known = [row for row in rows if row is not None]
    if not known:
        return None
    everyone = torch.ones_like(known[0])
    return torch.stack([everyone if row is None else row for row in rows])


def _samples(target: Any, size: int) -> Tensor | None:
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape[:1] != (size,):
        return None
    return (target != UNLABELLED).reshape(size, -1).any(1)


class RepMTLTrainer(Trainer):
    """A ``transformers.Trainer`` for a model that has a :class:`RepMTL` among its modules.

    The model is a :class:`RepMTLModel`, or one of your own whose ``forward`` takes ``step``, calls
    the criterion, and returns the total as ``loss``::

        def forward(self, input_ids, attention_mask, upos=None, deprel=None, step=None):
            z = self.encoder(input_ids, attention_mask).last_hidden_state
            ...
            loss = self.criterion(losses, z, positions=attention_mask.bool(), step=step)

    Either may be wrapped by PEFT. The Trainer then does what a plain one would not:

    - ``step`` is the number of the optimiser's step. The batches of an accumulated gradient count
      as one for ``every``, ``start``, ``ramp`` and ``strength``.
    - The total of a batch, a mean, is divided by the number of batches of its step. It does not
      count the labels of the whole step (``num_items_in_batch``).
    - Checkpoints have the criterion's count and running means, and what its monitor has seen, also
      those of PEFT that have the adapters alone. They are in ``trainer_state.json``.
    - With ``fp16`` the criterion's scaler is that of Accelerate.
    - ``loss_<task>``, ``tsr`` and ``csa`` are logged with ``loss``: the means over the batches of
      all processes since the last log (of the two latter, over those with the regulariser). With
      them goes ``ratio``, this process's last measurement.
    - With a :class:`RepMTLModel`, ``label_names`` are its tasks, the columns of a data set are
      those that encoder and tasks have, and ``compute_metrics`` is given ``predictions`` and
      ``label_ids`` as dicts by task.

    CSA needs batches of two samples at least: ``dataloader_drop_last=True``. Put this class first
    to use it with another Trainer: ``class Own(RepMTLTrainer, OtherTrainer)``.

    Raises:
        ValueError: the model does not have exactly one :class:`RepMTL`, or its ``forward`` no
            ``step``; or with ``label_smoothing_factor``, ``compute_loss_func`` or DeepSpeed.
    """

    # Trainer's own, None until it is known.
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        **options: Any,
    ) -> None:
        if args is not None and args.label_smoothing_factor:
            raise ValueError(
                "args: expected label_smoothing_factor=0, since the model has several losses; got "
                f"{args.label_smoothing_factor}. Smooth the labels in the losses themselves"
            )
        super().__init__(model, args, *others, **options)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func: expected None, since the criterion is in the model's forward; "
                "got a function"
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "args: expected no DeepSpeed, whose engine has not been tried with gradients of "
                "gradients; got a DeepSpeed configuration"
            )
        own = self._own_model()
        if "step" not in inspect.signature(own.forward).parameters:
            raise ValueError(
                "model: expected a forward with a parameter step, to give to its RepMTL; got "
                f"{type(own).__name__}.forward{inspect.signature(own.forward)}"
            )
        # False: the total is a mean over its batch, whatever else forward takes.
        self.model_accepts_loss_kwargs = False
        if isinstance(own, RepMTLModel) and self.args.label_names is None:
            self.label_names = [*own.heads]
        self._seen = _Means()
        self.add_callback(RepMTLState(self.criterion))

    @property
    def criterion(self) -> RepMTL:
        """The model's criterion; ``criterion.last`` has the last batch's values."""
        return _criterion_of(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the total of the model's criterion, as ``Trainer.compute_loss`` does.

        Raises:
            ValueError: in training, the model has not called its criterion, or that has another
                scaler than Accelerate.
        """
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        criterion = self.criterion
        before = criterion.last
        inputs = {**inputs, "step": self.state.global_step}
        with _scaler_of(criterion, getattr(self.accelerator, "scaler", None)):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if criterion.last is None or criterion.last is before:
            raise ValueError(
                "model: expected a forward that calls its RepMTL and returns the total as loss; "
                f"{type(self._own_model()).__name__} has not called it"
            )
        self._seen.add(criterion.last)
        return result

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *others: Any, **options: Any
    ) -> tuple[Tensor | None, Any, Any]:
        """Return loss, predictions and labels of a batch; of a RepMTLModel as dicts by task."""
        loss, logits, labels = super().prediction_step(model, inputs, *others, **options)
        if labels is not None and isinstance(self._own_model(), RepMTLModel):
            several = labels if isinstance(labels, tuple) else (labels,)
            labels = dict(zip(self.label_names, several, strict=True))
        return loss, logits, labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ``logs``, in training with the values of the criterion."""
        if "loss" in logs:
            logs.update(self._seen.take(self.accelerator))
        super().log(logs, start_time)

    # A name that transformers keeps for its subclasses, though it has an underscore.
    def _set_signature_columns_if_needed(self) -> None:
        own = self._own_model()
        if self._signature_columns is None and isinstance(own, RepMTLModel):
            self._signature_columns = [*_inputs_of(own.encoder), *own.heads, *self.label_names]
        super()._set_signature_columns_if_needed()

    def _own_model(self) -> nn.Module:
        """Return the model without the wrappers of PEFT and others."""
        return _without_peft(self.accelerator.unwrap_model(self.model))


class RepMTLState(TrainerCallback, ExportableState):
    """Keeps the state of the model's :class:`RepMTL` and its monitor in ``trainer_state.json``.

    :class:`RepMTLTrainer` adds it.

    Args:
        criterion: None: the one that the Trainer's model has, once training begins.
    """

    def __init__(self, criterion: RepMTL | None = None) -> None:
        self.criterion = criterion
        self.numbers: list[float] | None = None
        self.observed: str | None = None  # the state of its monitor

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        if self.criterion is not None:
            self.numbers = self.criterion.get_extra_state().tolist()
            monitor = self.criterion.monitor
            self.observed = None if monitor is None else as_text(monitor.get_extra_state())
        return {"args": {}, "attributes": {"numbers": self.numbers, "observed": self.observed}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **others: Any
    ) -> None:
        """Take on the state of the checkpoint, if training resumes from one that has it."""
        self.criterion = _criterion_of(model)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:  # it is a checkpoint's
            numbers = saved["attributes"]["numbers"]
            self.criterion.set_extra_state(torch.tensor(numbers, dtype=torch.float64))
            observed, monitor = saved["attributes"].get("observed"), self.criterion.monitor
            if observed is not None and monitor is not None:
                monitor.set_extra_state(from_text(observed))
        self.criterion._forget_step()  # the steps' numbers may begin again


def _criterion_of(model: nn.Module) -> RepMTL:
    found = [module for module in model.modules() if isinstance(module, RepMTL)]
    if len(found) != 1:
        raise ValueError(
            f"model: expected one RepMTL among its modules, got {len(found)} in "
            f"{type(_without_peft(model)).__name__}"
        )
    return found[0]


def _without_peft(model: nn.Module) -> nn.Module:
    unwrapped = getattr(model, "get_base_model", None)
    return model if unwrapped is None else unwrapped()


def _inputs_of(encoder: nn.Module) -> list[str]:
    parameters = inspect.signature(_without_peft(encoder).forward).parameters.values()
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    names = [p.name for p in parameters if p.kind not in variable]
    if not names:
        raise ValueError(
            "args: expected remove_unused_columns=False, since the forward of the encoder "
            f"({type(encoder).__name__}) names no inputs; got True"
        )
    return names


@contextmanager
def _scaler_of(criterion: RepMTL, scaler: torch.amp.GradScaler | None) -> Iterator[None]:
    """Give the criterion this scaler for a while."""
    own = criterion.scaler
    if own is not None and own is not scaler:
        raise ValueError(
            "criterion: expected scaler=None, since the Trainer has Accelerate's; got another one"
        )
    criterion.scaler = scaler
    try:
        yield
    finally:
        criterion.scaler = own


class _Means:
    """Sums of what training steps show, on the device, with the number of each."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | None] = {}
        self._counts: dict[str, int] = {}
        self._ratio: Tensor | None = None

    def add(self, step: RepMTLStep) -> None:
        """Add the values of a step; one that it lacks keeps its place all the same."""
        losses = {f"loss_{task}": loss for task, loss in step.losses.items()}
        for name, value in {**losses, "tsr": step.tsr, "csa": step.csa}.items():
            sum_before = self._sums.setdefault(name, None)
            count_before = self._counts.setdefault(name, 0)
            if value is not None:
                self._sums[name] = value.float() if sum_before is None else sum_before + value
                self._counts[name] = count_before + 1
        if step.ratio is not None:
            self._ratio = step.ratio

    def take(self, accelerator: Any) -> dict[str, float]:
        """Return the means over all processes, and begin again."""
        if not self._sums:
            return {}
        zero = torch.zeros((), device=accelerator.device)
        sums = torch.stack([zero if total is None else total for total in self._sums.values()])
        both = torch.stack([sums, sums.new_tensor([*self._counts.values()])])
        sums_of_all, counts = accelerator.gather(both.unsqueeze(0)).sum(0).tolist()
        named = zip(self._sums, sums_of_all, counts, strict=True)
        means = {name: total / count for name, total, count in named if count}
        if self._ratio is not None:
            means["ratio"] = self._ratio.item()
        self._sums, self._counts, self._ratio = {}, {}, None
        return means
