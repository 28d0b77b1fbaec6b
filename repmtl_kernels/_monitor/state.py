"""The state of a monitor as one tensor, for checkpoints."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def packed(header: dict[str, Any], tensors: Sequence[Tensor]) -> Tensor:
    """Return a float64 tensor on the CPU: the header as JSON, then the tensors, flat.

    Its elements are the length of the text, its bytes, and the numbers. A tensor is the only type
    whose serialisation PyTorch keeps compatible, and the only one that safetensors takes.
    """
    text = json.dumps(header).encode()
    numbers = torch.tensor([len(text), *text], dtype=torch.float64, device="cpu")
    return torch.cat([numbers, *(x.detach().flatten().to("cpu", torch.float64) for x in tensors)])


def unpacked(state: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Return the header and a copy of the numbers, on the CPU."""
    state = state.detach().to("cpu", torch.float64)
    end = 1 + int(state[0])
    header = json.loads(bytes(int(x) for x in state[1:end].tolist()))
    # Not an inference tensor, whatever mode a checkpoint is loaded in.
    with torch.inference_mode(False):
        return header, state[end:].clone()


def as_text(state: Tensor) -> str:
    """Return a packed state as text, for checkpoints that are JSON, which has no NaN."""
    return base64.b64encode(state.numpy().astype("<f8").tobytes()).decode()


def from_text(text: str) -> Tensor:
    """Return the packed state of a text."""
    numbers = np.frombuffer(base64.b64decode(text), dtype="<f8")
    return torch.from_numpy(numbers.astype(np.float64))
