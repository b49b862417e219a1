"""Settings for all tests: one compute thread, and hypothesis without a deadline on shared machines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("shared-machine", deadline=None, max_examples=40)
settings.load_profile("shared-machine")
