"""modelslim_dynamic: the layout of ModelSlim (see modelslim.py) with every quantised module W8A8_DYNAMIC.

It needs no calibration, and is exact arithmetic for arithmetic what w8a8 is, but for scales that bf16 has.
"""

from __future__ import annotations

import torch

from isthmus.formats.modelslim import DYNAMIC, ModelSlim

FORMAT = ModelSlim("modelslim_dynamic", torch.bfloat16, attention=DYNAMIC)
