"""The 8-bit float by its definition, and numbers that are hard to round into it."""

from __future__ import annotations

import math

import numpy as np
import torch


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails: some blocks are a thousand times others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).mul(2).exp()


def e4m3_value(code: int) -> float:
    """The OCP 8-bit format by its definition: bias 7, no infinities, S.1111.111 is no number."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


TABLE = np.array([e4m3_value(code) for code in range(256)])


def decoded(values: torch.Tensor) -> np.ndarray:
    return TABLE[values.view(torch.uint8).numpy()]
