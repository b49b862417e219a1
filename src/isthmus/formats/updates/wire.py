"""What crosses between two pools at each RL step: the tensors of a format as one safetensors message with a hash."""

from __future__ import annotations

import hashlib

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from isthmus.errors import DamagedFile


def pack(tensors: dict[str, Tensor]) -> bytes:
    """The tensors as one message. The same tensors give the same bytes."""
    return safetensors.torch.save(tensors)


def digest(payload: bytes) -> str:
    """SHA-256 of a message, hexadecimal: the hash that `unpack` wants."""
    return hashlib.sha256(payload).hexdigest()


def set_sha256(hashes: dict[str, str]) -> str:
    """SHA-256 of a whole set of tensors, hexadecimal, however it was split into messages.

    It covers one line `NAME HASH` per tensor in the order of names, with the hashes of model/digest.py.
    """
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def unpack(payload: bytes, sha256: str) -> dict[str, Tensor]:
    """The tensors of a message. Raises DamagedFile if its hash is not `sha256`, or if it is no safetensors message."""
    found = digest(payload)
    if found != sha256:
        raise DamagedFile(
            f"the weights that arrived ({len(payload):,} bytes) have the SHA-256 {found[:16]}..., "
            f"the sender announced {sha256[:16]}...; send them again"
        )
    try:
        return safetensors.torch.load(payload)
    except KeyError as error:  # the table of dtypes that torch has
        raise DamagedFile(f"the weights that arrived have a dtype that is not known here: {error}") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise DamagedFile(f"the weights that arrived are not a safetensors message: {error}") from None
