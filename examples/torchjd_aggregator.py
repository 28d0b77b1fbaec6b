"""Train with Rep-MTL beside an aggregator of TorchJD.

pip install "torchjd[quadprog-projector]"
python examples/torchjd_aggregator.py
"""

import torch
from scenes import Scenes, encoder, heads, loss_functions
from torch import nn
from torch.utils.data import DataLoader
from torchjd.aggregation import UPGrad
from torchjd.autojac import jac_to_grad

from repmtl_kernels import RepMTL
from repmtl_kernels.integrations.torchjd import rep_mtl_backward

torch.manual_seed(0)
trunk, branches, loss_of = encoder(), nn.ModuleDict(heads()), loss_functions()
criterion, aggregator = RepMTL(lambda_tsr=0.01, lambda_csa=0.01), UPGrad()
optimizer = torch.optim.Adam([*trunk.parameters(), *branches.parameters()], lr=5e-3)
batches = DataLoader(Scenes(), batch_size=32, shuffle=True, drop_last=True)

for epoch in range(4):
    for images, targets in batches:
        z = trunk(images)
        with criterion.second_order():
            losses = {t: loss_of[t](branch(z), targets[t]) for t, branch in branches.items()}
        optimizer.zero_grad()
        # This call replaces torchjd's mtl_backward(losses, features=z).
        rep_mtl_backward(losses, features=z, criterion=criterion)
        weights = jac_to_grad(trunk.parameters(), aggregator)
        optimizer.step()
    # If the tasks do not conflict, UPGrad's weights are those of the mean.
    named = zip(losses, weights.tolist(), strict=True)
    print(
        f"epoch {epoch}: total {criterion.last.total:.3f}, weights of the last step:",
        ", ".join(f"{task} {weight:.2f}" for task, weight in named),
    )
