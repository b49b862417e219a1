"""modelslim_mixed: the layout of ModelSlim (see modelslim.py) with attention in W8A16 and MLPs in W8A8_DYNAMIC.

What of the model has which type may be chosen for each module: `isthmus convert --budget` does it by what each costs.
"""

from __future__ import annotations

import torch

from isthmus.formats.modelslim import WEIGHTS_ONLY, ModelSlim

FORMAT = ModelSlim("modelslim_mixed", torch.bfloat16, attention=WEIGHTS_ONLY)
