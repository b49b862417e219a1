"""Rounding of int8 weights to the inputs that they meet: GPTQ (arXiv 2210.17323).

Column by column, the error of rounding is taken out by the columns that are still to be rounded, as far as the inputs
of the module (their second moments, the gram) let one column stand for another. Scales stay those of plain rounding, so
format, size and kernels are the same. A row for which that loses more of the output than rounding to the nearest is
rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.formats.parts.ranges import Calibration

LARGEST = 127
DAMPING = 0.01
"""Share of the mean diagonal that is added to the gram, as in the paper."""
BLOCK = 128
_POWER_STEPS = 4
LEADING, DRAWN = 8, 16
"""Inputs that stand for a gram: its leading directions, and a sample of the others. Of two errors of a row's output the
ratio that 16 drawn inputs show is more than 32 times the true one once in 2 * 10^8 (F distribution)."""


def gptq_round(weight: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """int8 values [M, K] of a weight [M, K] with scales [M, 1], for inputs with second moments gram [K, K].

    No row loses more of the output, in the mean square over these inputs, than rounding to the nearest.
    """
    exact = weight.detach().double() / scale.double()
    nearest = exact.round().clamp_(-LARGEST, LARGEST)
    values = _compensated(exact.clone(), gram.double())
    worse = _lost(exact - values, gram.double()) > _lost(exact - nearest, gram.double())
    return torch.where(worse[:, None], nearest, values).to(torch.int8)


def sample_inputs(gram: Tensor) -> Tensor:
    """Inputs [LEADING + DRAWN, K] in fp32 that stand for all those with the second moments `gram` [K, K].

    The squared length of `inputs @ error` estimates, without bias, what a row's error loses of the output in the mean
    square. The same gram gives the same inputs.
    """
    generator = torch.Generator().manual_seed(0)
    root = _root(gram.double())
    leading = torch.randn(len(gram), min(LEADING, len(gram)), generator=generator, dtype=torch.float64)
    for _ in range(_POWER_STEPS):
        leading = torch.linalg.qr(root.T @ (root @ leading)).Q
    drawn = torch.randn(DRAWN, len(gram), generator=generator, dtype=torch.float64) / DRAWN**0.5
    drawn -= drawn @ leading @ leading.T
    return (torch.cat((leading.T, drawn)) @ root.T).float()


def _lost(error: Tensor, gram: Tensor) -> Tensor:
    return (error @ gram * error).sum(1)


def _compensated(work: Tensor, gram: Tensor) -> Tensor:
    """Integers in float64 for weights in steps [M, K], which are used up."""
    inverse = _inverse_factor(gram)
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
    return values


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
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(gram)))
    return torch.linalg.cholesky(inverse, upper=True)


def _root(gram: Tensor) -> Tensor:
    """Lower Cholesky factor of a gram with the least damping that makes it positive definite in spite of rounding."""
    for share in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        root, failed = torch.linalg.cholesky_ex(_damped(gram, share))
        if not int(failed):
            return root
    return torch.linalg.cholesky(_damped(gram))


def _damped(gram: Tensor, share: float = DAMPING) -> Tensor:
    diagonal = gram.diagonal().mean().clamp_min(1e-12) * share
    return gram + diagonal * torch.eye(len(gram), dtype=gram.dtype)
