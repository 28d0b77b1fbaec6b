"""The network that most tests of the criterion train."""

import pytest
import torch
from small_network import Network


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()
