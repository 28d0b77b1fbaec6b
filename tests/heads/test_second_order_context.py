"""The context second_order(): where it holds, and which calls it leaves to PyTorch."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from cases import DEVICE
from double_backward import F64, assert_same, is_fast, leaf, norm, small_head
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from repmtl_kernels import RepMTL
from repmtl_kernels._heads.second_order import convert_second_order, second_order


def test_only_inside():
    x, w = leaf(2, 3, 5), leaf(4, 3, 3)
    with second_order():
        assert is_fast(F.conv1d(x, w))
        with second_order():
            assert is_fast(F.conv1d(x, w))
        assert is_fast(F.conv1d(x, w))
    assert not is_fast(F.conv1d(x, w))
    with pytest.raises(ZeroDivisionError), second_order():
        raise ZeroDivisionError
    assert not is_fast(F.conv1d(x, w))
    context = second_order()
    with context, context:
        assert is_fast(F.conv1d(x, w))
    assert not is_fast(F.conv1d(x, w))

    @second_order()
    def again(depth):
        return is_fast(F.conv1d(x, w)) and (depth == 0 or again(depth - 1))

    assert again(2) and not is_fast(F.conv1d(x, w))


def test_threads():
    x, w = leaf(2, 3, 5), leaf(4, 3, 3)
    results = {}

    def work(name, context):
        with context:
            results[name] = is_fast(F.conv1d(x, w))

    with second_order():
        threads = [
            threading.Thread(target=work, args=("without", nullcontext())),
            threading.Thread(target=work, args=("with", second_order())),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {"without": False, "with": True}


def test_nothing_where_no_gradient_is_needed():
    x, w = leaf(2, 3, 5), leaf(4, 3, 3)
    layer, image = norm("2d", True)
    layer.requires_grad_(False)
    with second_order():
        assert F.conv1d(x.detach(), w.detach()).grad_fn is None
        assert layer(image.detach()).grad_fn is None
        with torch.no_grad():
            assert not F.conv1d(x, w).requires_grad
        with torch.inference_mode():
            assert F.conv1d(x, w).is_inference()


BAD = {
    "dimensions": lambda: F.conv2d(leaf(3, 4), leaf(2, 3, 3, 3)),
    "channels": lambda: F.conv2d(leaf(1, 3, 4, 4), leaf(2, 4, 3, 3)),
    "dtype": lambda: F.conv2d(leaf(1, 3, 4, 4), leaf(2, 3, 3, 3, dtype=torch.float32)),
    "same with a stride": lambda: F.conv1d(leaf(1, 3, 4), leaf(2, 3, 3), None, 2, "same"),
    "padding's name": lambda: F.conv1d(leaf(1, 3, 4), leaf(2, 3, 3), padding="full"),
    "kernel": lambda: F.conv1d(leaf(1, 3, 4), leaf(2, 3, 5)),
    "keyword": lambda: F.conv1d(leaf(1, 3, 4), leaf(2, 3, 3), strides=1),
    "no tensor": lambda: F.conv1d([1.0], leaf(2, 3, 3)),
    "one value per channel": lambda: nn.BatchNorm1d(3)(leaf(1, 3, dtype=torch.float32)),
    "no statistics": lambda: F.batch_norm(leaf(2, 3), None, None),
    "eps": lambda: F.batch_norm(leaf(2, 3), None, None, training=True, eps=0.0),
    "leaf in place": lambda: F.relu_(leaf(2, 3)),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_pytorchs(name):
    with pytest.raises(Exception) as expected:
        BAD[name]()
    with pytest.raises(Exception) as raised, second_order():
        BAD[name]()
    assert (raised.type, str(raised.value)) == (expected.type, str(expected.value))


def test_empty_batch():
    layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).to(DEVICE, F64)
    x = leaf(0, 3, 5, 5)
    with second_order():
        y = layers(x)
    y.sum().backward()
    assert y.shape == (0, 2, 3, 3) and x.grad.shape == x.shape


def test_saved_tensors_are_guarded():
    x, w = leaf(2, 3, 5), leaf(4, 3, 3)
    with second_order():
        y = F.conv1d(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice():
    layer, x = norm("2d", True)
    with second_order():
        loss = F.relu(layer(x)).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, *torch.autograd.grad(loss, x))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Subclass(torch.Tensor):
    pass


def test_subclasses_are_left_to_pytorch():
    x, w = leaf(2, 3, 5).as_subclass(Subclass), leaf(4, 3, 3)
    with second_order():
        y = F.conv1d(x, w)
    assert type(y) is Subclass and not is_fast(y)


def test_complex_numbers_are_left_to_pytorch():
    x, w = leaf(2, 3, 5, dtype=torch.complex128), leaf(4, 3, 3, dtype=torch.complex128)
    with second_order():
        assert not is_fast(F.conv1d(x, w))


def test_checkpoint():
    head, x = small_head().train(), leaf(2, 3, 4, 5)
    plain = copy.deepcopy(head)

    def gradients(head, run):
        (first,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(head.parameters()))

    expected = gradients(plain, plain)
    inside = second_order()(head)
    assert_same(gradients(head, lambda x: checkpoint(inside, x, use_reentrant=False)), expected)
    convert_second_order(head)
    assert_same(gradients(head, lambda x: checkpoint(head, x, use_reentrant=False)), expected)


class FunctionalReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("converted", [False, True])
def test_checkpoint_inside_a_context(converted):
    """A context around a checkpointed function doesn't matter if there is one inside."""
    plain, x = FunctionalReLU().to(DEVICE, F64), leaf(2, 3, 4, 5)
    results = []
    for fast in (False, True):
        head = copy.deepcopy(plain)
        if fast and converted:
            convert_second_order(head)
        with second_order() if fast else nullcontext():
            inside = second_order()(head) if fast else head
            y = checkpoint(inside, x, use_reentrant=False) if fast else head(x)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        first.square().sum().backward(inputs=list(head.parameters()))
        results.append([first.detach(), *(p.grad for p in head.parameters())])
    assert_same(*results)


@pytest.mark.parametrize("backward_within", [False, True])
@pytest.mark.parametrize(
    "layers",
    [(nn.Conv2d, nn.BatchNorm2d), (nn.Conv2d, nn.BatchNorm2d, nn.ReLU), (nn.Conv2d,)],
    ids=lambda layers: "-".join(layer.__name__ for layer in layers),
)
def test_context_around_a_checkpoint_leaves_it_alone(layers, backward_within):
    """Its function runs again in the backward, perhaps without the context."""
    arguments = {nn.Conv2d: (6, 4, 3), nn.BatchNorm2d: (4,), nn.ReLU: ()}

    def gradients(around):
        torch.manual_seed(0)
        encoder = nn.Conv2d(3, 6, 3).double()
        heads = [nn.Sequential(*(f(*arguments[f]) for f in layers)).double() for _ in range(2)]
        criterion, x = RepMTL(0.1, 0.2), torch.randn(3, 3, 9, 9).double()
        weight = torch.rand(4, 5, 5).double()
        with second_order() if around else nullcontext():
            z = encoder(x)
            outputs = [checkpoint(head, z, use_reentrant=False) for head in heads]
            total = criterion([(y.sin() * weight).mean() for y in outputs], z)
            if backward_within:
                total.backward()
        if not backward_within:
            total.backward()
        return [p.grad for module in (encoder, *heads) for p in module.parameters()]

    with pytest.warns(UserWarning, match="enter the context inside the function"):
        actual = gradients(around=True)
    torch.testing.assert_close(actual, gradients(around=False), rtol=1e-10, atol=1e-14)
