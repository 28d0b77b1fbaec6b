"""Train with Rep-MTL in a plain PyTorch loop. One batch in four has no labels for depth.

python examples/plain_loop.py
"""

import torch
from scenes import Scenes, encoder, heads, loss_functions
from torch import nn
from torch.utils.data import DataLoader

from repmtl_kernels import RepMTL

EPOCHS = 4

torch.manual_seed(0)
trunk, branches, loss_of = encoder(), nn.ModuleDict(heads()), loss_functions()
# docs/tuning.md says why. Every third call: the fourth batches are of one kind.
criterion = RepMTL(strength=0.03, every=3, tsr_floor=0.1, log_losses=True, log_offset=0.01)
parameters = [*trunk.parameters(), *branches.parameters()]
optimizer = torch.optim.Adam(parameters, lr=5e-3)
# CSA contrasts the samples of a batch, so the last batch must not have a single one.
batches = DataLoader(Scenes(), batch_size=32, shuffle=True, drop_last=True)
held_out = Scenes(64, seed=1)

for epoch in range(EPOCHS):
    trunk.train(), branches.train(), criterion.train()
    for step, (images, targets) in enumerate(batches):
        if step % 4 == 1:
            targets["depth"] = None
        z = trunk(images)
        with criterion.second_order():
            losses = {
                task: None if targets[task] is None else loss_of[task](branch(z), targets[task])
                for task, branch in branches.items()
            }
        total = criterion(losses, z)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if criterion.last.applied:
            applied = criterion.last
    print(
        f"epoch {epoch}: TSR {applied.tsr:.3f}, CSA {applied.csa:.3f}, regulariser's gradient "
        f"{applied.ratio:.3f} of the tasks'",
        end="; ",
    )
    trunk.eval(), branches.eval(), criterion.eval()
    with torch.no_grad():
        z = trunk(held_out.images)
        right = branches["segmentation"](z).argmax(1) == held_out.segmentation
        off = (branches["depth"](z) - held_out.depth).abs()
    print(
        f"held out: {right.float().mean():.1%} of the pixels right, depth off by {off.mean():.3f}"
    )
