"""After torch's tutorial of tensor parallelism: columns, then rows, over a mesh of the ranks."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


kind = torch.accelerator.current_accelerator().type
torch.accelerator.set_device_index(int(os.environ["RANK"]))
mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
torch.manual_seed(0)
model = parallelize_module(Toy().to(kind), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, foreach=True)
for step in range(3):
    torch.manual_seed(step)
    model(torch.rand(4, 8, device=kind)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
