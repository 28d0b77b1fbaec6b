"""A problem for batch norm's derivatives as Triton kernels, and autograd's results as the judge."""

import torch
from cases import DEVICE, LAYOUTS, grad_tolerance, relative_error

from repmtl_kernels._heads.second_order import triton as kernels

ALL = (True, True, True)
EPS = 1e-3


class Problem:
    """The arguments of both functions, and the results of autograd for them in float64."""

    def __init__(
        self,
        shape,
        dtype=torch.float32,
        layout="contiguous",
        grad_layout=None,
        *,
        training=True,
        affine=True,
        relu=True,
        present=ALL,
    ):
        generator = torch.Generator().manual_seed(0)

        def draw(size, offset, kind="contiguous"):
            values = torch.randn(size, generator=generator, dtype=torch.float64) + offset
            return LAYOUTS[kind](0, values.to(DEVICE, dtype))

        channels = shape[1]
        self.training = training
        self.x = draw(shape, 0.7, layout)
        self.grad = draw(shape, 0.2, grad_layout or layout)
        self.weight = draw((channels,), 1.0) if affine else None
        bias = draw((channels,), 0.0).double()
        mean, invstd = _statistics(self.x.double())
        self.mean = (mean if training else mean + 0.3).float()
        self.invstd = (invstd if training else invstd * 1.2).float()
        self.output = None
        if relu:
            exact = self._normalized(self.x.double(), self._ones_or(self.weight))
            self.output = torch.empty_like(self.x).copy_((exact + _along(bias, exact)).relu())
        grad_grads = [
            draw(shape, 0.0, grad_layout or layout),
            draw((channels,), 0.0),
            draw((channels,), 0.0),
        ]
        self.grad_grads = [g if i else None for g, i in zip(grad_grads, present, strict=True)]

    @property
    def operands(self):
        return self.grad, self.x, self.weight, self.mean, self.invstd, self.output, self.training

    @property
    def parameter(self):
        """A tensor of the shape and dtype of the parameters' gradients."""
        return self.mean if self.weight is None else self.weight

    def first(self, needs=ALL):
        return kernels.batch_norm_backward(*self.operands, needs)

    def second(self, needs=ALL):
        return kernels.batch_norm_double_backward(*self.grad_grads, *self.operands, needs)

    def exact(self):
        """The results of both functions in float64; zeros where autograd finds no dependence."""
        leaves = [
            v.double().clone().requires_grad_()
            for v in (self.grad, self.x, self._ones_or(self.weight))
        ]
        grad, x, weight = leaves
        bias = torch.zeros_like(weight, requires_grad=True)
        y = self._normalized(x, weight) + _along(bias, x)
        if self.output is not None:
            y = y * (self.output > 0)
        first = torch.autograd.grad(y, (x, weight, bias), grad, create_graph=True)
        present = [i for i, g in enumerate(self.grad_grads) if g is not None]
        second = [torch.zeros_like(v) for v in leaves]
        if present:
            second = torch.autograd.grad(
                [first[i] for i in present],
                leaves,
                [self.grad_grads[i].double() for i in present],
                allow_unused=True,
                materialize_grads=True,
            )
        return [f.detach() for f in first], second

    def _ones_or(self, weight):
        return torch.ones_like(self.mean).double() if weight is None else weight.double()

    def _normalized(self, x, weight):
        if self.training:
            mean, invstd = _statistics(x)
        else:
            mean, invstd = self.mean.double(), self.invstd.double()
        return (x - _along(mean, x)) * _along(invstd * weight, x)


def _statistics(x):
    dims = [d for d in range(x.dim()) if d != 1]
    return x.mean(dims), (x.var(dims, unbiased=False) + EPS).rsqrt()


def _along(values, x):
    return values.view(-1, *[1] * (x.dim() - 2))


def _check(actual, exact, operands, needs, dtype):
    tolerance = grad_tolerance(dtype, "triton")
    for got, expected, operand, need in zip(actual, exact, operands, needs, strict=True):
        assert (got is not None) == need
        if not need:
            continue
        assert got.dtype == operand.dtype and got.shape == operand.shape
        if expected.norm() < 1e-12:  # zero but for rounding
            assert got.abs().max() <= tolerance
        else:
            assert relative_error([got], [expected]) <= tolerance


def check_first(problem, dtype=torch.float32, needs=ALL):
    like = (problem.x, problem.parameter, problem.parameter)
    _check(problem.first(needs), problem.exact()[0], like, needs, dtype)


def check_second(problem, dtype=torch.float32, needs=ALL):
    like = (problem.grad, problem.x, problem.parameter)
    _check(problem.second(needs), problem.exact()[1], like, needs, dtype)


def check_both(problem, dtype=torch.float32):
    check_first(problem, dtype)
    check_second(problem, dtype)
