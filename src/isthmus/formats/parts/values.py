"""Which types and values the parts of a checkpoint may have, whoever wrote it: scales, offsets, biases, weights.

A scale is a positive finite number: zeros erase a block and a negative one turns its sign, and no quantiser writes
either. E8M0 (OCP Microscaling Formats MX v1.0, section 5.4.1) is a power of two, 2^(byte - 127), and 255 is no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from isthmus.formats.parts.assemble import ROUTER_BIAS
from isthmus.formats.parts.int8 import LARGEST

E8M0, E8M0_NAN = torch.float8_e8m0fnu, 255
FLOAT_KINDS = ("F64", "F32", "F16", "BF16")
"""Types of float tensors that are read, as safetensors writes them."""
UE8M0 = "ue8m0"
"""What `scale_fmt` in a config.json says of scales that are powers of two (DeepSeek-V3.1)."""
_SCALES = frozenset(("weight_scale", "weight_scale_inv", "input_scale", "deq_scale"))


def block_scale_kinds(scale_fmt: str | None) -> tuple[str, ...]:
    """The types that scales of fp8 blocks may be stored in. Bytes are E8M0 only where config.json says so."""
    return (*FLOAT_KINDS, "F8_E8M0", *(("U8",) if scale_fmt == UE8M0 else ()))


def scale_numbers(stored: Tensor) -> Tensor:
    """Scales in fp32, whatever they are stored in: floats, E8M0, its bytes, or fp32's bit pattern in int64."""
    if stored.dtype == torch.int64:
        return stored.to(torch.int32).view(torch.float32)
    if stored.dtype == torch.uint8:
        stored = stored.view(E8M0)
    return stored.to(torch.float32)


def scale_problem(stored: Tensor, *, powers_of_two: bool = False) -> str | None:
    """What is wrong with the values of scales, in words; None if nothing is."""
    scale = scale_numbers(stored)
    if problem := _not_finite(scale):
        return problem
    if wrong := int((scale <= 0).sum()):
        return f"holds {wrong:,} of {scale.numel():,} scales that are not positive, {float(scale.min()):g} among them"
    if powers_of_two and (wrong := int((torch.frexp(scale).mantissa != 0.5).sum())):
        return f"holds {wrong:,} of {scale.numel():,} scales that are no powers of two, and scale_fmt is {UE8M0}"
    return None


def value_problems(names: Iterable[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, str]]:
    """Name, and what is wrong, of each small tensor of a bundle that has a value which its layout rules out.

    Others are not read: a weight that is no number shows in what it computes.
    """
    for name in names:
        if problem := _part_problem(name, partial(read, name)):
            yield name, problem


def _part_problem(name: str, read: Callable[[], Tensor]) -> str | None:
    part = name.rpartition(".")[2]
    if part in _SCALES:
        return scale_problem(read())
    if part == ROUTER_BIAS:
        return _not_finite(read().float())
    if part == "weight_offset":
        return "is not zero, and asymmetric weights are not read" if bool(read().any()) else None
    if part == "input_offset":
        offset = read().float()
        whole = (offset == offset.round()) & (offset >= -LARGEST - 1) & (offset <= LARGEST)
        return None if bool(whole.all()) else "holds an offset that is no value of int8"
    return None


def weight_problem(weight: Tensor) -> str | None:
    """How many numbers of a float tensor are not finite, and where the first is; None if all are."""
    if not weight.numel() or _is_finite(weight):
        return None
    return _not_finite(weight)


def _is_finite(values: Tensor) -> bool:
    """Least and greatest tell it: NaN and infinity reach both."""
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _not_finite(values: Tensor) -> str | None:
    bad = ~torch.isfinite(values)
    count = int(bad.sum())
    if not count:
        return None
    nans = int(torch.isnan(values).sum())
    kinds = [f"{nans:,} NaN"] if nans else []
    kinds += [f"{count - nans:,} infinite"] if count > nans else []
    place = bad.nonzero()[0].tolist()
    where = f", the first at {place}" if place else ""
    return f"holds {count:,} numbers of {values.numel():,} that are not finite ({', '.join(kinds)}{where})"
