"""The training step, the optimiser and verified checkpoints, shared by supervised and reinforcement training."""
