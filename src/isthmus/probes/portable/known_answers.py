"""Products whose result is known, and products that carry their own check. Needs torch and the standard library only.

`products` are of integers, so that the exact result is known by construction and any other is an error, however small.
`checksum` is of real numbers: the sums of rows and columns are compared with what the inputs say that they must be
(K.-H. Huang and J. A. Abraham, IEEE Transactions on Computers C-33, 1984), and equal chips with each other, bit by bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

EXACT = {"float32": 2**24, "float16": 2**11, "bfloat16": 2**8}
"""Up to this magnitude a type holds every integer."""
SUREST = 8.0
"""Standard deviations of accumulated rounding that a checksum is allowed, as in Higham and Mary, SISC 41, 2019."""


def products(
    rank: Any, size: int = 256, repeats: int = 8, seed: int = 0, dtypes: tuple[str, ...] | list[str] = ("float32",)
) -> dict[str, Any]:
    """Multiply integer matrices [size, size], `repeats` pairs in each of `dtypes`, and compare with the exact result.

    All partial sums are integers that the type holds, so neither the order of summation nor the precision of the
    accumulator changes the result. Returns {failed, detail, trials, failures, worst}; `worst` is the largest error.
    """
    wrong: list[str] = []
    worst = 0.0
    for repeat in range(repeats):
        for dtype in dtypes:
            rank.beat(f"known answers in {dtype}", repeat)
            left, right, expected = known_product(size, seed + repeat, EXACT[dtype])
            kind = getattr(torch, dtype)
            found = (left.to(rank.device, kind) @ right.to(rank.device, kind)).to("cpu", torch.float32)
            if not torch.equal(found, expected):
                row, column, error = _largest_difference(found, expected)
                worst = max(worst, error)
                wrong.append(f"{dtype} product {repeat} is off by {error:g} at [{row}, {column}]")
    trials = repeats * len(dtypes)
    said = f"rank {rank.rank}: {len(wrong)} of {trials} products of {size} x {size} integers are wrong"
    detail = f"{said}; {'; '.join(wrong[:3])}" if wrong else f"rank {rank.rank}: {trials} products are exact"
    return {"failed": bool(wrong), "detail": detail, "trials": trials, "failures": len(wrong), "worst": _finite(worst)}


def known_product(size: int, seed: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integer matrices A = U V and B = W Z in fp32, and A B = U (V W) Z, which needs no product of that size.

    The factors are [size, 2] and [2, size]. Their integers are up to 2 in magnitude if then every partial sum of the
    product, at most 64 size, stays within `limit`; else they are signs, and only as many columns of A are not zero
    as keep the sums, at most 4 each, within it.
    """
    generator = torch.Generator().manual_seed(seed)
    if 64 * size <= limit:
        u, w = (torch.randint(-2, 3, (size, 2), generator=generator) for _ in range(2))
        v, z = (torch.randint(-2, 3, (2, size), generator=generator) for _ in range(2))
    else:
        u, w = (2 * torch.randint(0, 2, (size, 2), generator=generator) - 1 for _ in range(2))
        v, z = (2 * torch.randint(0, 2, (2, size), generator=generator) - 1 for _ in range(2))
        order = torch.rand(size, generator=generator).argsort()
        v[:, order[max(1, limit // 4) :]] = 0
    core = (v.unsqueeze(1) * w.T.unsqueeze(0)).sum(-1)
    return _outer_sum(u, v).float(), _outer_sum(w, z).float(), _outer_sum(_outer_sum(u, core), z).float()


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """left [n, 2] times right [2, m], by elementwise integer arithmetic."""
    return left[:, :1] * right[:1] + left[:, 1:] * right[1:]


def checksum(rank: Any, size: int = 256, repeats: int = 8, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """Multiply real matrices [size, size] and check the sums of rows and columns of each product in fp32.

    A sum that is off by more than rounding can explain, `SUREST` sqrt(2 size) eps sum |A| |B|, names the row and the
    column; the product is then computed again, which tells a passing fault from a lasting one. Chips that are equal
    must also agree bit by bit: the results are hashed and compared over all ranks. Returns {failed, detail, trials,
    failures, lasting, digest, odd}; `odd` are the ranks that differ from the majority.
    """
    kind = getattr(torch, dtype)
    wrong: list[str] = []
    lasting = 0
    results = hashlib.sha256()
    for repeat in range(repeats):
        rank.beat("checksum matmul", repeat)
        generator = torch.Generator().manual_seed(seed + repeat)
        left, right = (torch.randn(size, size, generator=generator).to(kind) for _ in range(2))
        operands = left.to(rank.device), right.to(rank.device)
        found = operands[0] @ operands[1]
        results.update(_content(found))
        place = locate(operands[0], operands[1], found)
        if place is not None:
            again = operands[0] @ operands[1]
            lasts = locate(operands[0], operands[1], again) is not None
            lasting += lasts
            manner = "again when repeated" if lasts else "and right when repeated"
            wrong.append(f"product {repeat} is wrong at [{place[0]}, {place[1]}] by about {place[2]:g}, {manner}")
    digest = results.hexdigest()
    odd = odd_ranks(rank, digest)
    if rank.rank in odd:
        wrong.append("its results differ from those of the other ranks, bit by bit")
    said = f"{repeats} checksum products of {size} x {size} in {dtype}"
    detail = f"rank {rank.rank}: " + ("; ".join(wrong[:3]) + f" (of {said})" if wrong else f"{said} agree")
    return {
        "failed": bool(wrong),
        "detail": detail,
        "trials": repeats,
        "failures": len(wrong),
        "lasting": lasting,
        "digest": digest,
        "odd": odd,
    }


def locate(left: Tensor, right: Tensor, product: Tensor) -> tuple[int, int, float] | None:
    """(row, column, size of the error) where the checksums of a product do not hold; None where they do."""
    a, b, c = left.float(), right.float(), product.float()
    rows = (c.sum(1) - (a * b.sum(1)).sum(1)).abs()
    columns = (c.sum(0) - (a.sum(0).unsqueeze(1) * b).sum(0)).abs()
    eps = torch.finfo(product.dtype).eps
    scale = SUREST * math.sqrt(2.0 * len(a)) * eps
    row_room = scale * (a.abs() * b.abs().sum(1)).sum(1)
    column_room = scale * (a.abs().sum(0).unsqueeze(1) * b.abs()).sum(0)
    bad_rows, bad_columns = ~(rows <= row_room), ~(columns <= column_room)
    if not (bad_rows.any() or bad_columns.any()):
        return None
    row = int(torch.nan_to_num(rows / row_room, nan=math.inf).argmax())
    column = int(torch.nan_to_num(columns / column_room, nan=math.inf).argmax())
    return row, column, max(float(rows[row]), float(columns[column]))


def odd_ranks(rank: Any, digest: str) -> list[int]:
    """The ranks whose hash is not that of more than half of all; all of them if there is no such majority."""
    mine = int(digest[:15], 16)
    if rank.world == 1 or not dist.is_initialized():
        return []
    hashes = [torch.zeros(1, dtype=torch.int64, device=rank.device) for _ in range(rank.world)]
    dist.all_gather(hashes, torch.tensor([mine], dtype=torch.int64, device=rank.device))
    values = [int(one) for one in hashes]
    most, count = Counter(values).most_common(1)[0]
    if 2 * count <= rank.world:
        return list(range(rank.world))
    return [index for index, value in enumerate(values) if value != most]


def _largest_difference(found: Tensor, expected: Tensor) -> tuple[int, int, float]:
    difference = torch.nan_to_num((found - expected).abs(), nan=math.inf)
    place = int(difference.argmax())
    row, column = divmod(place, found.shape[1])
    return row, column, float(difference[row, column])


def _content(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    host = tensor.detach().cpu().contiguous()
    return ctypes.string_at(host.data_ptr(), host.numel() * host.element_size())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
