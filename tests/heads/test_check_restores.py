"""RepMTL.check leaves heads, gradients, buffers and random state as they were."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from faulty_heads import Apply, D, N, OwnKernel, bags, tokens
from torch import Tensor, nn

from repmtl_kernels._heads.preflight import SecondDerivativeError, check


class Noisy(nn.Module):
    """Uses the random state, running statistics and an own buffer."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(N)
        self.dropout = nn.Dropout(0.5)
        self.last = last
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.last(self.dropout(self.norm(x)) + torch.randn_like(x))


@pytest.mark.parametrize("faulty", [False, True])
def test_leaves_everything_as_it_was(faulty: bool):
    head = Noisy(Apply(OwnKernel.apply) if faulty else nn.Linear(D, D)).to(DEVICE)
    head.dropout.eval()
    parameters = list(head.parameters())
    for p in parameters:
        p.grad = torch.full_like(p, 7.0)
        p.register_hook(lambda grad: pytest.fail("a parameter's gradient was computed"))
    buffers = dict(head.named_buffers())
    copies = {name: b.clone() for name, b in buffers.items()}
    versions = {name: b._version for name, b in buffers.items()}
    grads = [p.grad for p in parameters]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in head.modules()]
    state = torch.random.get_rng_state()
    device_state = torch.cuda.get_rng_state() if DEVICE == "cuda" else None
    z = tokens(requires_grad=True) * 1
    torch.random.set_rng_state(state)
    if device_state is not None:
        torch.cuda.set_rng_state(device_state)

    with torch.no_grad():  # as in a script: gradients are switched on inside
        if faulty:
            with pytest.raises(SecondDerivativeError, match="'last'"):
                check(head, z)
        else:
            check(head, z)
        assert not torch.is_grad_enabled()

    assert torch.equal(torch.random.get_rng_state(), state)
    if device_state is not None:
        assert torch.equal(torch.cuda.get_rng_state(), device_state)
    for name, b in head.named_buffers():
        assert b is buffers[name] and b._version == versions[name]
        torch.testing.assert_close(b, copies[name], rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(parameters, grads, strict=True))
    assert all((p.grad == 7).all() for p in parameters)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in head.modules()]
    assert head.training and not head.dropout.training
    assert z.grad_fn is not None and z._version == 0


def test_a_head_that_raises_leaves_everything_as_it_was():
    head = Noisy(nn.Linear(D + 1, D)).to(DEVICE)
    before = {name: b.clone() for name, b in head.named_buffers()}
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        check(head, tokens().clone())
    assert not isinstance(raised.value, SecondDerivativeError)
    for name, b in head.named_buffers():
        torch.testing.assert_close(b, before[name], rtol=0, atol=0)
    torch.random.set_rng_state(state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("faulty", [False, True])
def test_a_scripted_head(faulty: bool):
    """Its buffers can be set one by one, and it takes no hooks."""

    class Bags(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bags(x)

    last = Bags() if faulty else nn.Tanh()
    inner = torch.jit.script(nn.Sequential(nn.BatchNorm1d(N), last).to(DEVICE))
    head = nn.Sequential(nn.Linear(D, D), inner, nn.BatchNorm1d(N)).to(DEVICE)
    before = {name: b.clone() for name, b in head.named_buffers()}
    if faulty:
        with pytest.raises(SecondDerivativeError, match="EmbeddingBag has no derivative"):
            check(head, tokens())
    else:
        check(head, tokens())
    assert len(before) == 6
    for name, b in head.named_buffers():
        torch.testing.assert_close(b, before[name], rtol=0, atol=0)
    assert inner.training


def test_buffers_that_a_head_makes_or_replaces_go_back():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), device=DEVICE))

        def forward(self, x):
            self.calls = self.calls + 1
            self.register_buffer("made", x.detach())
            return x.tanh()

    head = Counts()
    calls = head.calls
    check(head, tokens())
    assert list(head._buffers) == ["calls"] and head.calls is calls and calls == 0


def test_under_inference_mode():
    head = Noisy(nn.Linear(D, D)).to(DEVICE)
    before = {name: b.clone() for name, b in head.named_buffers()}
    with torch.inference_mode():
        check(head, tokens())
    for name, b in head.named_buffers():
        torch.testing.assert_close(b, before[name], rtol=0, atol=0)
