"""Power-law exponents of the weights' spectra, as ``weightwatcher`` fits them."""

from __future__ import annotations

import logging
import math
from importlib.util import find_spec

from torch import nn

from benchmarks.quality.networks import Network


def exponents(network: Network) -> dict[str, float | None]:
    """Mean exponent of the encoder's layers and of each head's; None: no layer is large enough."""
    parts = {"encoder": network.encoder, **network.heads}
    return {name: exponent(module) for name, module in parts.items()}


def exponent(module: nn.Module) -> float | None:
    if find_spec("weightwatcher") is None:
        raise ModuleNotFoundError(
            "weightwatcher, which a study with `spectra = true` needs, is not installed: "
            "pip install weightwatcher"
        )
    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    details = weightwatcher.WeightWatcher(model=module).analyze()
    if "alpha" not in details:
        return None
    alphas = [a for a in details["alpha"].tolist() if math.isfinite(a) and a > 0]
    return round(sum(alphas) / len(alphas), 4) if alphas else None
