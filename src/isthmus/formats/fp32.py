"""fp32: the trained weights as they are, and the reference.

What it computes on the CPU defines what every other format is compared with.
"""

import torch

from isthmus.formats.parts.assemble import FloatFormat

FORMAT = FloatFormat("fp32", torch.float32)
