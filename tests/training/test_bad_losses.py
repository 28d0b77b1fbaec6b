"""Losses and representations that are refused, and the messages."""

from __future__ import annotations

import pytest
import torch
from small_network import BATCH, TASKS, Network
from torch import Tensor, nn

from repmtl_kernels import RepMTL, task_saliencies


def written_one_by_one(losses: list[Tensor]) -> Tensor:
    out = torch.zeros(len(losses), dtype=losses[0].dtype)
    for t, loss in enumerate(losses):
        out[t] = loss
    return out


ZEROS = r"backpropagates zeros through the branches of all other tasks"


def restack(how):
    """Return a function that makes the losses elements of one tensor."""
    return lambda losses, z: (how(losses), z)


BAD = {
    "stacked": (
        restack(torch.stack),
        TypeError,
        r"losses: expected a list or dict .* got one Tensor of shape \(3,\)\. Every .*" + ZEROS,
    ),
    "unbound": (
        restack(lambda losses: list(torch.stack(losses))),
        ValueError,
        r"losses\[0\] and losses\[1\]: .* elements of one stacked tensor.*" + ZEROS,
    ),
    "indexed": (
        restack(lambda losses: [(s := torch.stack(losses))[0], losses[1], s[2]]),
        ValueError,
        r"losses\[0\] and losses\[2\]: .*" + ZEROS,
    ),
    "concatenated": (
        restack(lambda losses: dict(zip("abc", torch.hstack(losses), strict=True))),
        ValueError,
        r"losses\['a'\] and losses\['b'\]: .*" + ZEROS,
    ),
    "written one by one": (
        restack(lambda losses: [(out := written_one_by_one(losses))[0], out[1]]),
        ValueError,
        r"losses\[0\] and losses\[1\]: .*" + ZEROS,
    ),
    "summed": (
        lambda losses, z: (sum(losses), z),
        TypeError,
        r"losses: .* got one scalar Tensor\. Pass the loss of each task, not their sum",
    ),
    "empty list": (
        lambda losses, z: ([], z),
        ValueError,
        r"losses: expected at least one task, got an empty list",
    ),
    "empty dict": (
        lambda losses, z: ({}, z),
        ValueError,
        r"losses: expected at least one task, got an empty dict",
    ),
    "generator": (
        lambda losses, z: ((loss for loss in losses), z),
        TypeError,
        r"losses: expected a list, tuple or dict of T scalar losses; got generator",
    ),
    "number": (
        lambda losses, z: ([losses[0], 0.5], z),
        TypeError,
        r"losses\[1\]: expected a scalar Tensor, got float",
    ),
    "vector": (
        lambda losses, z: ({"seg": losses[0].expand(4)}, z),
        ValueError,
        r"losses\['seg'\]: expected a scalar of shape \(\), got shape \(4,\)\. .*\.mean\(\)",
    ),
    "one element": (
        lambda losses, z: ([losses[0], losses[1].view(1)], z),
        ValueError,
        r"losses\[1\]: .* got shape \(1,\)\. Reduce it with \.mean\(\) or \.squeeze\(\)",
    ),
    "detached": (
        lambda losses, z: ([losses[0], losses[1].detach()], z),
        ValueError,
        r"losses\[1\]: expected a loss with a graph, got one without: it was detached.*pass None",
    ),
    "independent": (
        lambda losses, z: ({"a": losses[0], "c": losses[1].detach().requires_grad_().exp()}, z),
        ValueError,
        r"losses\['c'\]: does not depend on representation\. Pass the very tensor.* penalty on",
    ),
    "a leaf": (
        lambda losses, z: ([losses[0], torch.ones((), requires_grad=True)], z),
        ValueError,
        r"losses\[1\]: does not depend on representation\.",
    ),
    "another representation": (
        lambda losses, z: (losses, z.clone()),
        ValueError,
        r"losses\[0\]: does not depend on representation\.",
    ),
    "representation of another task": (
        lambda losses, z: (losses, [z, z, z.clone()]),
        ValueError,
        r"losses\[2\]: does not depend on representation\[2\]",
    ),
    "detached representation": (
        lambda losses, z: (losses, z.detach()),
        ValueError,
        r"representation: expected a tensor with requires_grad=True, .* it was detached .*frozen",
    ),
    "one detached representation": (
        lambda losses, z: (dict(zip("abc", losses, strict=True)), {"a": z, "b": z.data, "c": z}),
        ValueError,
        r"representation\['b'\]: expected a tensor with requires_grad=True",
    ),
    "too few representations": (
        lambda losses, z: (losses, [z, z]),
        ValueError,
        r"representation: expected 3, one for each loss; got 2",
    ),
    "representation of no type": (
        lambda losses, z: (losses, None),
        TypeError,
        r"representation: expected a Tensor \(multi-input: .*\), got NoneType",
    ),
    "representations of no tensor": (
        lambda losses, z: (losses, [z, z, 1.0]),
        TypeError,
        r"representation\[2\]: expected a Tensor, got float",
    ),
    "keys of the representations": (
        lambda losses, z: (dict(zip("abc", losses, strict=True)), {"a": z, "b": z, "d": z}),
        ValueError,
        r"representation: expected the keys of losses, \['a', 'b', 'c'\]; got \['a', 'b', 'd'\]",
    ),
    "dict and list": (
        lambda losses, z: (dict(zip("abc", losses, strict=True)), [z, z, z]),
        TypeError,
        r"representation: losses is a dict, so expected a dict with the same keys; got list",
    ),
    "list and dict": (
        lambda losses, z: (losses, {0: z, 1: z, 2: z}),
        TypeError,
        r"representation: losses is a list, so expected a list or tuple .* got dict",
    ),
}


@pytest.mark.parametrize("call", ("task_saliencies", "RepMTL"))
@pytest.mark.parametrize("bad, error, message", BAD.values(), ids=BAD.keys())
def test_message_for_bad_input(network: Network, bad, error, message: str, call: str) -> None:
    z = network.encoder(network.images())
    losses, representation = bad(network.losses(z, network.targets()), z)
    with pytest.raises(error, match=message):
        (task_saliencies if call == "task_saliencies" else RepMTL())(losses, representation)


def test_message_without_any_loss(network: Network) -> None:
    z = network.encoder(network.images())
    for losses in ([None] * 3, {"a": None}):
        for training in (True, False):
            with pytest.raises(ValueError, match=r"losses: .* at least one task, got None for all"):
                RepMTL().train(training)(losses, z)
    with pytest.raises(TypeError, match=r"losses\[0\]: expected a scalar Tensor, got NoneType"):
        task_saliencies([None, z.mean()], z)


@pytest.mark.parametrize("every", (1, 2))
def test_message_without_gradients(network: Network, every: int) -> None:
    criterion = RepMTL(every=every)
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match=r"disabled here .*criterion\.eval"):
            criterion(losses, z)
        criterion(losses, z)
    with torch.no_grad(), pytest.raises(ValueError, match="gradients are disabled here"):
        task_saliencies(losses, z)


def test_message_names_inference_mode(network: Network) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    with torch.inference_mode():
        losses[2] = network.losses(z, network.targets())[2]
    with pytest.raises(ValueError, match=r"losses\[2\]: .* under torch.inference_mode"):
        task_saliencies(losses, z)


def test_message_for_an_inplace_head(network: Network) -> None:
    z = network.encoder(network.images())
    first = z.sum()
    second = z.relu_().square().sum()
    with pytest.raises(ValueError, match=r"losses\[0\]: does not depend .*ReLU\(inplace=True\)"):
        RepMTL()([first, second], z)


@pytest.mark.parametrize("call", (task_saliencies, RepMTL()), ids=("task_saliencies", "RepMTL"))
def test_message_for_swapped_arguments(network: Network, call) -> None:
    z = network.encoder(network.images())
    with pytest.raises(TypeError, match="got one Tensor, .* got list. Are they swapped"):
        call(z, network.losses(z, network.targets()))


def test_message_for_a_compiled_step(network: Network) -> None:
    @torch.compile(backend="aot_eager")
    def forward(x):
        z = network.encoder(x)
        return z, network.losses(z, network.targets())

    z, losses = forward(network.images())
    made_outside = [loss.square() for loss in losses]
    for task_losses in (losses, made_outside):
        with pytest.raises(ValueError, match=r"torch.compile region.* compile the encoder alone"):
            RepMTL()(task_losses, z)


def test_message_for_a_number_in_place_of_an_absent_loss(network: Network) -> None:
    z = network.encoder(network.images())
    losses = [*network.losses(z, network.targets())[:-1], 0.0]
    with pytest.raises(TypeError, match=r"losses\[2\]: .* got float\. For a task .* pass None"):
        RepMTL()(losses, z)


def test_message_for_representations_of_different_shapes(network: Network) -> None:
    z = [network.encoder(network.images()[: BATCH - t]) for t in range(TASKS)]
    losses = [head(x).square().mean() for head, x in zip(network.heads, z, strict=True)]
    expected = r"representation\[1\]: every task must have the shape of representation\[0\]"
    with pytest.raises(ValueError, match=expected):
        RepMTL()(losses, z)
    named = [dict(zip("abc", values, strict=True)) for values in (losses, z)]
    expected = r"representation\['b'\]: every task must have the shape of representation\['a'\]"
    with pytest.raises(ValueError, match=expected):
        RepMTL()(*named)


@pytest.mark.parametrize(
    "make",
    (
        lambda h, z: torch.zeros((), requires_grad=True),
        lambda h, z: torch.zeros(()),
        lambda h, z: h.weight.square().sum() * 0,
        lambda h, z: h(z.detach()).square().mean() * 0,
        lambda h, z: torch.zeros((), requires_grad=True) * 1,
    ),
    ids=("leaf", "constant", "penalty", "detached", "not a leaf"),
)
def test_message_for_a_task_without_labels_says_to_pass_none(make) -> None:
    z, head = nn.Conv2d(3, 4, 1)(torch.randn(4, 3, 5, 5)), nn.Conv2d(4, 3, 1)
    with pytest.raises(ValueError, match=r"losses\[1\]: .*labels.* pass None") as raised:
        RepMTL()([head(z).square().mean(), make(head, z)], z)
    assert "representation" in str(raised.value) or "graph" in str(raised.value)


def test_message_for_copies_of_a_prepared_model() -> None:
    """Accelerate's mixed precision returns float32 copies of a model's results."""
    encoder, head = nn.Conv2d(3, 4, 1).bfloat16(), nn.Conv2d(4, 3, 1).bfloat16()
    z = encoder(torch.randn(4, 3, 5, 5).bfloat16())
    prediction = head(z)
    with pytest.raises(ValueError, match="copy in torch.float32.*Accelerate.*one by one"):
        RepMTL()([prediction.float().square().mean()] * 2, z.float())
    z = z.float()  # heads that are prepared on their own get the copy
    assert RepMTL()([head(z.bfloat16()).float().square().mean() for _ in range(2)], z).isfinite()
