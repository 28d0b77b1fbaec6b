"""Train with Rep-MTL in the Trainer of a LibMTL checkout, on random images, also multi-input.

    git clone https://github.com/median-research-group/LibMTL
    pip install cvxpy qpsolvers scipy torch_geometric
    python examples/libmtl_checkout.py LibMTL

The script also compares the trained weights. Without the regulariser they have to be those of
LibMTL's own equal weighting. With it they must differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from repmtl_kernels.integrations.libmtl import register

TASKS = ("shape", "colour")
CLASSES = 4
SAMPLES = 32
EPOCHS = 2


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, CLASSES)
    )


class Images(Dataset):
    """Random images, with the label of one task or with a dict of all labels."""

    def __init__(self, seed: int, task: str | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
        self.labels = torch.randint(CLASSES, (len(TASKS), SAMPLES), generator=generator)
        self.task = task

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        labels = dict(zip(TASKS, self.labels[:, index], strict=True))
        return self.images[index], labels if self.task is None else labels[self.task]


def loaders(multi_input: bool) -> DataLoader | dict[str, DataLoader]:
    if not multi_input:
        return DataLoader(Images(0), batch_size=8, drop_last=True)
    return {
        task: DataLoader(Images(seed, task), batch_size=8, drop_last=True)
        for seed, task in enumerate(TASKS)
    }


def train(weighting: str, weight_args: dict, *, rep_grad: bool, multi_input: bool) -> nn.Module:
    """Return the Trainer, after training."""
    from LibMTL import Trainer
    from LibMTL.loss import CELoss
    from LibMTL.metrics import AccMetric

    class AnyDeviceTrainer(Trainer):
        # The Trainer sets the first CUDA device, even if there is none.
        device = property(
            lambda self: torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),
            lambda self, device: None,
        )

    torch.manual_seed(0)
    trainer = AnyDeviceTrainer(
        task_dict={
            task: {
                "metrics": ["accuracy"],
                "metrics_fn": AccMetric(),
                "loss_fn": CELoss(),
                "weight": [1],
            }
            for task in TASKS
        },
        weighting=weighting,
        architecture="HPS",
        encoder_class=Encoder,
        decoders=nn.ModuleDict({task: decoder() for task in TASKS}),
        rep_grad=rep_grad,
        multi_input=multi_input,
        optim_param={"optim": "sgd", "lr": 0.1},
        scheduler_param=None,
        weight_args=weight_args,
        arch_args={},
    )
    trainer.train(loaders(multi_input), loaders(multi_input), EPOCHS)
    return trainer


def distance(trainer: nn.Module, other: nn.Module) -> float:
    """Return the largest relative distance between the parameters of two trained models."""
    pairs = zip(trainer.model.parameters(), other.model.parameters(), strict=True)
    return max(((p - q).norm() / q.norm()).item() for p, q in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of a LibMTL checkout")
    checkout = parser.parse_args().checkout
    if not (checkout / "LibMTL" / "trainer.py").is_file():
        sys.exit(f"{checkout}: expected a checkout of LibMTL, with LibMTL/trainer.py in it")
    sys.path.insert(0, str(checkout))
    name = register()
    for multi_input in (False, True):
        print(f"\n--- {'multi-input' if multi_input else 'single input'} ---")
        equal = train("EW", {}, rep_grad=False, multi_input=multi_input)
        off = {"lambda_tsr": 0.0, "lambda_csa": 0.0}
        without = train(name, off, rep_grad=True, multi_input=multi_input)
        on = {"lambda_tsr": 0.1, "lambda_csa": 0.1}
        regularized = train(name, on, rep_grad=True, multi_input=multi_input)
        last = regularized.model.criterion.last
        print(f"last step: TSR {last.tsr:.4f}, CSA {last.csa:.4f}, total {last.total:.4f}")
        same, apart = distance(without, equal), distance(regularized, equal)
        print(f"weights, relative to equal weighting: {same:.1e} without the regulariser,", end=" ")
        print(f"{apart:.1e} with it")
        if not (same < 1e-4 < 1e-3 < apart):
            sys.exit("expected less than 1e-4 without the regulariser and more than 1e-3 with it")
    print("\nLibMTL's Trainer trains with Rep-MTL.")


if __name__ == "__main__":
    main()
