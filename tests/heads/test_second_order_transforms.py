"""second_order() under torch.func, vmap of backwards, compilers and tracers."""

import copy
from contextlib import nullcontext

import pytest
import torch
from double_backward import (
    GEOMETRIES,
    RELUS,
    assert_same,
    leaf,
    norm,
    norm_and_relu,
    ramp,
    small_head,
)

from repmtl_kernels._heads.second_order import convert_second_order, second_order


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # by torch.func.jvp
@pytest.mark.parametrize("way", ["context", "converted"])
def test_function_transforms(way):
    head, x, v = small_head(), leaf(2, 3, 4, 5).detach(), leaf(2, 3, 4, 5).detach()

    def loss(x):
        return head(x).pow(3).mean()

    def results(loss):
        return (
            torch.func.grad(loss)(x),
            torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x),
            torch.func.jvp(loss, (x,), (v,))[1],
            torch.func.vmap(loss)(torch.stack([x, v])),
        )

    expected = results(loss)
    if way == "converted":
        convert_second_order(head)
    actual = results(loss if way == "converted" else second_order()(loss))
    assert all(map(torch.equal, actual, expected))
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(x, v))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[2])


def rows_of_derivatives(function, inputs, way):
    """Return first derivatives for two vectors, gradients through these, and second derivatives."""

    def rows_of(outputs, create_graph=False):
        options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}

        def of_one(vectors, **more):
            gradients = torch.autograd.grad(outputs, inputs, vectors, **options, **more)
            return [g for g in gradients if g is not None]

        vectors = [torch.stack([ramp(-1, 2, y), ramp(2, 1, y)]) for y in outputs]
        if way == "vmap":
            return torch.vmap(of_one)(vectors)
        if way == "is_grads_batched":
            return of_one(vectors, is_grads_batched=True)
        rows = [of_one(row) for row in zip(*vectors, strict=True)]
        return [torch.stack(row) for row in zip(*rows, strict=True)]

    y = function(*inputs)
    first = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
    through = rows_of([y], create_graph=True)
    probe = y.sum() + sum(g.square().sum() for g in through)
    of_rows = torch.autograd.grad(probe, inputs, retain_graph=True, allow_unused=True)
    return [*(t.detach() for t in through), *of_rows, *rows_of(first)]


WAYS_OF_ROWS = pytest.mark.parametrize("way", ["vmap", "is_grads_batched"])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
@pytest.mark.parametrize("name", GEOMETRIES)
@WAYS_OF_ROWS
def test_rows_of_a_jacobian_through_convolution(name, way):
    function, input_size, weight_size, options = GEOMETRIES[name]
    inputs = leaf(*input_size), leaf(*weight_size)

    def call(x, w):
        return function(x, w, **options)

    expected = rows_of_derivatives(call, inputs, "one by one")
    assert_same(rows_of_derivatives(second_order()(call), inputs, way), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["2d", "no positions", "not affine"])
@pytest.mark.parametrize("activation", ["no ReLU", "ReLU", "in place"])
@WAYS_OF_ROWS
def test_rows_of_a_jacobian_through_batch_norm(name, activation, training, way):
    layer, x = norm(name, training)
    inputs = (x,) if layer.weight is None else (x, layer.weight, layer.bias)
    call = norm_and_relu(layer, RELUS[activation])
    expected = rows_of_derivatives(call, inputs, "one by one")
    assert_same(rows_of_derivatives(second_order()(call), inputs, way), expected)


def aot_eager_into(graphs):
    def backend(module, inputs):
        graphs.append(module.print_readable(print_output=False))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    return backend


@pytest.mark.parametrize("way", ["inside", "outside", "converted"])
def test_compiled(way):
    """Compilers get plain PyTorch: they have no use for derivatives that they can't look into."""
    head, x = small_head(), leaf(2, 3, 4, 5)
    plain = copy.deepcopy(head)

    def loss(x):
        with second_order() if way == "inside" else nullcontext():
            return head(x).pow(3).mean()

    def saliency(x):
        return torch.func.grad(loss)(x).square().sum()

    if way == "converted":
        convert_second_order(head)
    for function in (loss, saliency):
        torch._dynamo.reset()
        graphs = []
        compiled = torch.compile(function, fullgraph=True, backend=aot_eager_into(graphs))
        with second_order() if way == "outside" else nullcontext():
            result = compiled(x)
        assert "autograd_function" not in str(graphs)
        actual = result.detach(), *torch.autograd.grad(result, (x, *head.parameters()))
        result = plain(x).pow(3).mean()
        if function is saliency:
            (result,) = torch.autograd.grad(result, x, create_graph=True)
            result = result.square().sum()
        targets = x, *plain.parameters()
        assert_same(
            actual, (result.detach(), *torch.autograd.grad(result, targets, allow_unused=True))
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_traced():
    head, x = small_head(), leaf(2, 3, 4, 5)
    with second_order():
        traced = torch.jit.trace(head, x)
    assert "PythonOp" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), head(x))
