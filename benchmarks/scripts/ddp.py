"""After torch's tutorial of DistributedDataParallel: a model, a checkpoint that one rank writes and all load."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

kind = torch.accelerator.current_accelerator().type
rank = int(os.environ["RANK"])
torch.accelerator.set_device_index(rank)
dist.init_process_group(torch.distributed.get_default_backend_for_device(kind))
model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 5)).to(rank)
wrapped = DistributedDataParallel(model, device_ids=[rank])
path = Path(tempfile.gettempdir()) / f"ddp-{os.environ['MASTER_PORT']}.pt"
if rank == 0:
    torch.save(wrapped.state_dict(), path)
dist.barrier()
places = {f"{kind}:0": f"{kind}:{rank}"}
wrapped.load_state_dict(torch.load(path, map_location=places, weights_only=True))
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.001)
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.mse_loss(wrapped(torch.randn(20, 10).to(rank)), torch.randn(20, 5).to(rank)).backward()
    optimizer.step()
dist.barrier()
if rank == 0:
    path.unlink()
dist.destroy_process_group()
