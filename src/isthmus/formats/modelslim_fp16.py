"""modelslim_fp16: modelslim for a model of fp16, in which `deq_scale` is a bit pattern in int64 (see modelslim.py)."""

from __future__ import annotations

import torch

from isthmus.formats.modelslim import STATIC, ModelSlim

FORMAT = ModelSlim("modelslim_fp16", torch.float16, attention=STATIC)
