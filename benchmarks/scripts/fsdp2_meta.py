"""After torch's tutorial of FSDP2: parameters on the meta device, `fully_shard`, and a checkpoint in parts."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

kind = torch.accelerator.current_accelerator().type
rank = int(os.environ["RANK"])
torch.accelerator.set_device_index(rank)
dist.init_process_group(torch.distributed.get_default_backend_for_device(kind))
with torch.device("meta"):
    model = nn.Sequential(
        *(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
    )
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in model:
    fully_shard(layer, mp_policy=policy)
fully_shard(model, mp_policy=policy)
model.to_empty(device=kind)
for part in model.modules():
    if isinstance(part, nn.LayerNorm | nn.Linear):
        part.reset_parameters()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(2):
    model(torch.randn(2, 5, 16, device=kind)).float().square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
folder = f"{tempfile.gettempdir()}/fsdp2-{os.environ['MASTER_PORT']}"
state = get_model_state_dict(model)
checkpoint.save(state, checkpoint_id=folder)
checkpoint.load(state, checkpoint_id=folder)
set_model_state_dict(model, state)
dist.destroy_process_group()
