"""Calibration: what goes into the linear modules of a model while it reads its own text.

Shapes: N rows, K inputs of a module, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.formats.calibration.ranges import Calibration
from isthmus.model.model import Model, causal_mask
from isthmus.model.moe import Experts, swiglu

ROWS_AT_ONCE = 8
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


class _Collector:
    def __init__(self, gram: bool):
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        self.gram: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self._wants_gram = gram

    def add(self, path: str, x: Tensor) -> None:
        """x [..., K], inputs of the module at this path."""
        x = x.detach().flatten(0, -2).float()
        self.rows[path] = self.rows.get(path, 0) + len(x)
        if not len(x):
            return
        low, high = torch.aminmax(x, dim=0)
        self.low[path] = torch.minimum(self.low.get(path, low), low)
        self.high[path] = torch.maximum(self.high.get(path, high), high)
        if self._wants_gram:
            self.gram[path] = self.gram.get(path, 0.0) + x.T @ x


def calibrate(model: Model, sequences: list[list[int]], *, gram: bool = False) -> Calibration:
    """Run an fp32 model on token sequences and collect the range, and with `gram` the second moments, of every input.

    An expert that no token reached takes the range of all experts of its layer, and is listed in `unseen`. Raises
    IsthmusError if there is no sequence.
    """
    if not sequences:
        raise IsthmusError("a calibration needs text: give token sequences of the model's own answers")
    collector, handles = _Collector(gram), []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(_linear_hook(collector, path)))
        elif isinstance(module, Experts):
            handles.append(module.register_forward_pre_hook(_experts_hook(collector, path)))
    try:
        with torch.inference_mode():
            for start in range(0, len(sequences), ROWS_AT_ONCE):
                for length, rows in _by_length(sequences[start : start + ROWS_AT_ONCE]).items():
                    _run(model, torch.tensor(rows).view(-1, length))
    finally:
        for handle in handles:
            handle.remove()
    unseen = _fill_unseen(collector)
    moments = {path: total / collector.rows[path] for path, total in collector.gram.items()}
    return Calibration(collector.low, collector.high, moments, sum(map(len, sequences)), unseen)


def _run(model: Model, tokens: Tensor) -> None:
    hidden = model.hidden(tokens)
    model.logits(hidden)
    if model.mtp_layer is not None:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        model.mtp_next(hidden, tokens.roll(-1, dims=1), positions, causal_mask(tokens.shape[1]))


def _by_length(sequences: list[list[int]]) -> dict[int, list[list[int]]]:
    """Rows of one length: padding would count as text."""
    found: dict[int, list[list[int]]] = {}
    for sequence in sequences:
        found.setdefault(len(sequence), []).append(sequence)
    return found


def _linear_hook(collector: _Collector, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _module, inputs: collector.add(path, inputs[0])


def _experts_hook(collector: _Collector, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Experts)
        x, counts = inputs
        for index, rows in enumerate(x.split(counts.tolist())):
            gate, up = module.parts(index)["gate_up_proj"](rows).chunk(2, dim=-1)
            collector.add(f"{path}.{index}.{GATE}", rows)
            collector.add(f"{path}.{index}.{UP}", rows)
            collector.add(f"{path}.{index}.{DOWN}", swiglu(gate, up, module.limit))

    return hook


def _fill_unseen(collector: _Collector) -> tuple[str, ...]:
    unseen = tuple(path for path, rows in collector.rows.items() if not rows)
    for path in unseen:
        experts, _, part = path.rpartition(".experts.")
        part = part.partition(".")[2]
        seen = [p for p in collector.low if p.startswith(f"{experts}.experts.") and p.endswith(f".{part}")]
        collector.low[path] = torch.stack([collector.low[p] for p in seen]).amin(0)
        collector.high[path] = torch.stack([collector.high[p] for p in seen]).amax(0)
        if collector.gram:
            collector.gram[path] = torch.stack([collector.gram[p] for p in seen]).sum(0)
            collector.rows[path] = sum(collector.rows[p] for p in seen)
    return unseen
