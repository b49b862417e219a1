"""Calibration: what goes into the linear modules of a model while it reads its own text.

All text passes one layer before it passes the next, so that of a model that is made piece by piece one layer is in
memory. States between the layers, and second moments, wait in a file where they are large.

Shapes: N rows, K inputs of a module, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.formats.calibration.kept import KeptTensors
from isthmus.formats.parts.pieces import LentExperts, at_hand
from isthmus.formats.parts.ranges import Calibration
from isthmus.model.model import Model, causal_mask
from isthmus.model.moe import Experts, swiglu

ROWS_AT_ONCE = 8
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


class _Collector:
    def __init__(self, gram: bool):
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        self.gram: dict[str, Tensor] = {}
        self.moments = KeptTensors()
        self.rows: dict[str, int] = {}
        self.unseen: list[str] = []
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

    @contextmanager
    def watch(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """Collect what goes into the modules below this one, whose path is `prefix`, inside this context."""
        handles = []
        for name, child in module.named_modules():
            path = f"{prefix}.{name}" if name else prefix
            if isinstance(child, nn.Linear):
                handles.append(child.register_forward_pre_hook(_linear_hook(self, path)))
            elif isinstance(child, Experts | LentExperts):
                handles.append(child.register_forward_pre_hook(_experts_hook(self, path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._finish()

    def _finish(self) -> None:
        """Give the experts that saw nothing what the others of their layer saw, and put the second moments away."""
        unseen = [path for path, rows in self.rows.items() if not rows]
        for path in unseen:
            experts, _, part = path.rpartition(".experts.")
            part = part.partition(".")[2]
            seen = [p for p in self.low if p.startswith(f"{experts}.experts.") and p.endswith(f".{part}")]
            self.low[path] = torch.stack([self.low[p] for p in seen]).amin(0)
            self.high[path] = torch.stack([self.high[p] for p in seen]).amax(0)
            if self.gram:
                self.gram[path] = torch.stack([self.gram[p] for p in seen]).sum(0)
                self.rows[path] = sum(self.rows[p] for p in seen)
        self.unseen += unseen
        for path in list(self.gram):
            self.moments[path] = self.gram.pop(path) / self.rows[path]
        self.rows.clear()


@torch.inference_mode()
def calibrate(model: Model, sequences: list[list[int]], *, gram: bool = False) -> Calibration:
    """Run an fp32 model on token sequences and collect the range, and with `gram` the second moments, of every input.

    An expert that no token reached takes the range of all experts of its layer, and is listed in `unseen`. Raises
    IsthmusError if there is no sequence.
    """
    if not sequences:
        raise IsthmusError("a calibration needs text: give token sequences of the model's own answers")
    collector, states, batches = _Collector(gram), KeptTensors(), []
    for start in range(0, len(sequences), ROWS_AT_ONCE):
        for length, rows in _by_length(sequences[start : start + ROWS_AT_ONCE]).items():
            batches.append(torch.tensor(rows).view(-1, length))
            states[str(len(batches) - 1)] = model.model.embed_tokens(batches[-1])
    for index in range(model.architecture.num_hidden_layers):
        path = f"model.layers.{index}"
        with at_hand(model, path), collector.watch(model.model.layers[index], path):
            for number, tokens in enumerate(batches):
                positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
                rotation, mask = model.model.rotary(positions), causal_mask(tokens.shape[1])
                states[str(number)] = model.model.layers[index](states[str(number)], rotation, mask)
    with collector.watch(model.lm_head, "lm_head"):
        for state in states.values():
            collector.add("lm_head", model.model.norm(state))
    if model.mtp_layer is not None:
        path = f"model.layers.{model.architecture.num_hidden_layers}"
        with at_hand(model, path), collector.watch(model.mtp_layer, path):
            for state, tokens in zip(states.values(), batches, strict=True):
                positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
                model.mtp_next(state, tokens.roll(-1, dims=1), positions, causal_mask(tokens.shape[1]))
    return Calibration(
        collector.low, collector.high, collector.moments, sum(map(len, sequences)), tuple(collector.unseen)
    )


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
        assert isinstance(module, Experts | LentExperts)
        x, counts = inputs
        for index, rows in enumerate(x.split(counts.tolist())):
            gate, up = module.parts(index)["gate_up_proj"](rows).chunk(2, dim=-1)
            collector.add(f"{path}.{index}.{GATE}", rows)
            collector.add(f"{path}.{index}.{UP}", rows)
            collector.add(f"{path}.{index}.{DOWN}", swiglu(gate, up, module.limit))

    return hook
