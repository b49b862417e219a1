"""Rounding of int8 weights to the inputs that they meet: GPTQ (arXiv 2210.17323).

Column by column, the error of rounding is taken out by the columns that are still to be rounded, as far as the inputs
of the module (their second moments, the gram) let one column stand for another. Scales stay those of plain rounding, so
format, size and kernels are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.formats.calibration.ranges import Calibration

LARGEST = 127
DAMPING = 0.01
"""Share of the mean diagonal that is added to the gram, as in the paper."""
BLOCK = 128


def gptq_round(weight: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """int8 values [M, K] of a weight [M, K] with scales [M, 1], for inputs with second moments gram [K, K]."""
    work = weight.detach().double() / scale.double()
    inverse = _inverse_factor(gram.double())
    values = torch.empty_like(work)
    for start in range(0, work.shape[1], BLOCK):
        end = min(start + BLOCK, work.shape[1])
        errors = torch.empty(len(work), end - start, dtype=torch.float64)
        for column in range(start, end):
            values[:, column] = work[:, column].round().clamp(-LARGEST, LARGEST)
            error = (work[:, column] - values[:, column]) / inverse[column, column]
            work[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return values.to(torch.int8)


def round_with_calibration(
    stored: dict[str, Tensor], state: Mapping[str, Tensor], calibration: Calibration
) -> list[str]:
    """Round the int8 weights among stored tensors anew, in place; the names of those that were. `state` is in float.

    Raises IsthmusError if the calibration has no second moments, or if the format stores sums of the integers beside
    them, as ModelSlim's static modules do.
    """
    if not calibration.gram:
        raise IsthmusError("GPTQ needs the second moments of the inputs: calibrate(..., gram=True)")
    done = []
    for name, values in stored.items():
        scale = stored.get(f"{name}_scale")
        gram = calibration.gram.get(name.removesuffix(".weight"))
        if f"{name.removesuffix('.weight')}.quant_bias" in stored:
            raise IsthmusError(
                f"{name} has sums of its integers beside it, in quant_bias, which GPTQ would make wrong: "
                'with this format use rounding = "nearest"'
            )
        if values.dtype == torch.int8 and scale is not None and gram is not None:
            stored[name] = gptq_round(state[name].float(), scale, gram)
            done.append(name)
    return done


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped gram."""
    diagonal = gram.diagonal().mean().clamp_min(1e-12) * DAMPING
    damped = gram + diagonal * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
