"""convert_second_order(): layers that enter the context by themselves."""

import copy
import pickle

import pytest
import torch
from double_backward import is_fast, leaf, small_head
from torch import nn

from repmtl_kernels._heads.second_order import batch_norm as batch_norm_module
from repmtl_kernels._heads.second_order import convert_second_order

ALL_LAYERS = [
    nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1),
    nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1), nn.BatchNorm1d(2),
    nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.ReLU(),
]  # fmt: skip


def test_conversion():
    model = nn.ModuleList(copy.deepcopy(ALL_LAYERS))
    kinds, text = [type(m) for m in model], repr(model)
    state = copy.deepcopy(model.state_dict())
    assert convert_second_order(model) is model
    assert all(type(m) is not k and isinstance(m, k) for m, k in zip(model, kinds, strict=True))
    converted = [type(m) for m in model]
    assert repr(model) == text and list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    assert [type(m) for m in convert_second_order(model)] == converted
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in again] == converted
        assert all(map(torch.equal, again.state_dict().values(), state.values()))
    assert [type(m) for m in convert_second_order(model, undo=True)] == kinds


def test_converted_layers_are_fast():
    head, x = convert_second_order(small_head()), leaf(2, 3, 4, 5)
    conv, bn, _ = head
    assert is_fast(conv(x)) and is_fast(bn(conv(x)))
    assert type(head(x).grad_fn) is batch_norm_module.BatchNormReLU._backward_cls
    assert type(convert_second_order(nn.ReLU())).__module__.startswith("repmtl_kernels")


class OwnConv(nn.Conv2d):
    pass


def test_conversion_leaves_other_layers_alone():
    for layer in (OwnConv(2, 2, 1), nn.SyncBatchNorm(2), nn.Linear(2, 2), nn.ReLU6()):
        kind = type(layer)
        assert type(convert_second_order(layer)) is kind


def test_conversion_of_what_is_no_module():
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got list"):
        convert_second_order([nn.ReLU()])
    with pytest.raises(TypeError, match=r"undo: expected a bool, got int"):
        convert_second_order(nn.ReLU(), undo=1)
