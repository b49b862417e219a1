"""The hash of a tensor: of its type, shape and values, wherever and however it is stored."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and the row-major bytes, hexadecimal."""
    plain = tensor.detach().cpu().contiguous()
    header = f"{str(plain.dtype).removeprefix('torch.')}{tuple(plain.shape)}".encode()
    hasher = hashlib.sha256(header)
    if plain.numel():
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
