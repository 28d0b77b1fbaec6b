"""The Trainer: its model is one class of architecture and weighting."""

import numpy as np
import torch
from torch import nn

from . import architecture as architectures
from . import weighting as weightings


class Trainer(nn.Module):
    def __init__(
        self, task_dict, weighting, architecture, encoder_class, decoders, rep_grad, multi_input,
        optim_param, scheduler_param, save_path=None, load_path=None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        self.device = torch.device("cuda:0")
        self.task_dict, self.task_name = task_dict, [*task_dict]
        self.multi_input, self.kwargs = multi_input, kwargs
        bases = (vars(architectures)[architecture], vars(weightings)[weighting])
        arguments = (self.task_name, encoder_class, decoders, rep_grad, multi_input, self.device)
        self.model = type("MTLmodel", bases, {})(*arguments, **kwargs["arch_args"])
        self.model.init_param()
        self.model.to(self.device)
        if load_path is not None:
            self.model.load_state_dict(torch.load(load_path), strict=False)
        assert optim_param.pop("optim") == "sgd" and scheduler_param is None and save_path is None
        self.optimizer = torch.optim.SGD(self.model.parameters(), **optim_param)

    def train(self, train_dataloaders, test_dataloaders, epochs):
        for epoch in range(epochs):
            self.model.train()
            for batch in self._batches(train_dataloaders):
                # Stacked, since other weightings draw several batches of samples.
                losses = torch.stack([self._losses(*batch)]).squeeze(0)
                self.optimizer.zero_grad(set_to_none=False)
                weights = self.model.backward(losses, **self.kwargs["weight_args"])
                assert isinstance(weights, np.ndarray) and len(weights) == len(self.task_name)
                self.optimizer.step()
            trained = self._scores()
            self.model.eval()
            with torch.no_grad():
                for batch in self._batches(test_dataloaders):
                    self._losses(*batch)
            print(f"Epoch: {epoch:04d} | TRAIN: {trained} | TEST: {self._scores()}")

    def _batches(self, loaders):
        if not self.multi_input:
            yield from loaders
            return
        for batch in zip(*(loaders[task] for task in self.task_name), strict=True):
            inputs, labels = zip(*batch, strict=True)
            yield (dict(zip(self.task_name, each, strict=True)) for each in (inputs, labels))

    def _losses(self, inputs, labels):
        losses = torch.zeros(len(self.task_name)).to(self.device)
        predictions = {} if self.multi_input else self.model(inputs.to(self.device))
        for i, (task, about) in enumerate(self.task_dict.items()):
            if self.multi_input:
                predictions = self.model(inputs[task].to(self.device), task)
            label = labels[task].to(self.device)
            losses[i] = about["loss_fn"]._update_loss(predictions[task], label)
            about["metrics_fn"].update_fun(predictions[task], label)
        return losses

    def _scores(self):
        scores = {}
        for task, about in self.task_dict.items():
            scores[task] = about["metrics_fn"].score_fun()
            about["metrics_fn"].reinit()
        return scores
