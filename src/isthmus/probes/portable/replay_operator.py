"""One operator, called again with stored inputs: does it give the same bits each time, on every rank?"""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PLAIN = (bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)


def replay_operator(
    rank: Any, inputs: str, operator: str, call: dict[str, Any], digests: list[str], repeats: int = 5
) -> dict[str, Any]:
    """Call `operator`, named as in `aten::mm` or `aten::add.Tensor`, with the tensors of the file `inputs`.

    The file is a dict of tensors that torch saved. `call` has `arguments` and `named`, in which `{"tensor": name}`
    stands for a tensor of the file, `{"torch": name}` for a dtype, layout or memory format, `{"device": ""}` for this
    rank's device. `digests` are those of the results that differed where the inputs were stored.

    Returns `failed`: whether the results differ between the repeats or between ranks; `detail`; `digest`, of the first
    result; `known`: whether it is one of `digests`.
    """
    stored = torch.load(inputs, weights_only=True)
    found = []
    for repeat in range(repeats):
        rank.beat(operator, repeat)
        tensors = {name: tensor.to(rank.device, copy=True) for name, tensor in stored.items()}
        arguments = [_value(one, tensors, rank.device) for one in call["arguments"]]
        named = {name: _value(one, tensors, rank.device) for name, one in call["named"].items()}
        result = operator_of(operator)(*arguments, **named)
        found.append(digest_of([result, arguments, named]))
    unequal = sorted(index for index, digest in enumerate(found) if digest != found[0])
    odd = _odd_ranks(rank, found[0])
    detail = [f"repeats {unequal} differ from the first"] * bool(unequal) + [f"ranks {odd} differ from rank 0"] * bool(
        odd
    )
    return {
        "failed": bool(unequal or odd),
        "detail": f"{operator}: {'; '.join(detail)}" if detail else "",
        "digest": found[0],
        "known": found[0] in digests,
    }


def operator_of(name: str) -> Any:
    """The operator of a full name, `aten::add.Tensor` for example."""
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, space), packet), overload or "default")


def digest_of(values: Any) -> str:
    """SHA-256 over all tensors in nested lists and dicts, by dtype, shape and bits; other values by their text."""
    hashed = hashlib.sha256()
    _feed(values, hashed)
    return hashed.hexdigest()


def _feed(values: Any, hashed: Any) -> None:
    if isinstance(values, Tensor):
        plain = values.detach().cpu().resolve_conj().resolve_neg().contiguous()
        hashed.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        hashed.update(ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()))
    elif isinstance(values, dict):
        for name in sorted(values):
            hashed.update(name.encode())
            _feed(values[name], hashed)
    elif isinstance(values, (list, tuple)):
        hashed.update(f"[{len(values)}]".encode())
        for value in values:
            _feed(value, hashed)
    elif values is None or isinstance(values, _PLAIN):
        hashed.update(repr(values).encode())
    else:
        hashed.update(type(values).__name__.encode())


def _value(spec: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if isinstance(spec, list):
        return [_value(one, tensors, device) for one in spec]
    if not isinstance(spec, dict):
        return spec
    if "tensor" in spec:
        return tensors[spec["tensor"]]
    if "torch" in spec:
        return getattr(torch, spec["torch"])
    return device


def _odd_ranks(rank: Any, digest: str) -> list[int]:
    if rank.world == 1:
        return []
    mine = torch.tensor([int(digest[:15], 16)], dtype=torch.int64, device=rank.device)
    others = [torch.zeros_like(mine) for _ in range(rank.world)]
    dist.all_gather(others, mine)
    return [index for index, other in enumerate(others) if int(other) != int(others[0])]
