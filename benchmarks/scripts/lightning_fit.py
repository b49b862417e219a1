"""Lightning's Trainer on one device."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Small(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch, index):
        inputs, targets = batch
        return nn.functional.cross_entropy(self.layers(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


data = DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(4, (32,))), batch_size=8)
trainer = lightning.Trainer(
    accelerator="auto", devices=1, max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Small(), data)
