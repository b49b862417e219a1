"""bf16: what DeepSeek's users convert to first, and what transformers, vLLM and SGLang load without a quantiser.

The weights are rounded to the nearest, except the routing bias (fp32 in the published checkpoints as well). The model
built here computes with these rounded weights in fp32: rounding of activations belongs to the chip, not to the format.
"""

import torch

from isthmus.formats.parts.assemble import FloatFormat

FORMAT = FloatFormat("bf16", torch.bfloat16)
