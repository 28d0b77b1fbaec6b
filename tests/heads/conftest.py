"""Fixtures of the tests of heads."""

import pytest
import torch


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
