"""Tensors that wait until they are asked for, in memory as long as they are few and in a temporary file otherwise."""

from __future__ import annotations

import threading
from collections.abc import Iterator, MutableMapping
from tempfile import SpooledTemporaryFile

import torch
from torch import Tensor

IN_MEMORY = 128 << 20
"""Bytes from which on they are in a file."""


class KeptTensors(MutableMapping[str, Tensor]):
    """Tensors by name, each read whenever it is asked for, in memory of its own, from any thread.

    A tensor can be replaced by one of the same type and shape.
    """

    def __init__(self, in_memory: int = IN_MEMORY):
        self._file = SpooledTemporaryFile(in_memory)  # noqa: SIM115 - as long as the tensors are wanted
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self._end = 0
        self._lock = threading.Lock()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        start, dtype, shape = self._places.get(name, (self._end, tensor.dtype, tensor.shape))
        assert (dtype, shape) == (tensor.dtype, tensor.shape), f"{name} is kept as {dtype}{list(shape)}"
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        with self._lock:
            self._file.seek(start)
            self._file.write(content)
        self._places[name] = start, dtype, shape
        self._end = max(self._end, start + tensor.nbytes)

    def __getitem__(self, name: str) -> Tensor:
        start, dtype, shape = self._places[name]
        with self._lock:
            self._file.seek(start)
            content = bytearray(self._file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
