"""Parity: whether the model in a bundle is the model that was trained, per token, per answer, and by seal."""
