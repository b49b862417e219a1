"""After torch's recipe of automatic mixed precision: autocast, a scaler of gradients, and a convolution."""

import torch
from torch import nn

kind = torch.accelerator.current_accelerator().type
torch.manual_seed(1)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.25), nn.Linear(72, 10))
model = model.to(kind)
optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
scaler = torch.amp.GradScaler(kind)
for _ in range(3):
    data, target = torch.randn(16, 1, 8, 8).to(kind), torch.randint(10, (16,)).to(kind)
    optimizer.zero_grad()
    with torch.autocast(kind, dtype=torch.float16):
        loss = nn.functional.cross_entropy(model(data), target)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
