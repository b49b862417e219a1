"""Faults of an exchange of weights, planted in a model that serves. It is loaded into vLLM's own process too, so that
it needs torch alone: `--worker-extension-cls benchmarks.sentinel_plants.Plants`.

Each is armed before a version arrives and strikes after the switch, as an engine would that did something wrong in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

KINDS = ("stale tensor", "stale layer", "half of the layers", "transposed expert", "swapped projections", "one bit")
OF_LOADERS = "swapped projections"
MTP = "stale draft layer"


class Planter:
    """For the model that serves at a time. `hook` gets a function of tensors by name for faults of loaders, or None."""

    def __init__(self, model: Callable[[], nn.Module], hook: Callable[[Callable[..., Any] | None], None]):
        self.model, self.hook = model, hook
        self._strike: Callable[[], Any] = dict

    def arm(self, kind: str, seed: int) -> dict[str, Any]:
        """Prepare a fault. `planted` says where; None where this model cannot have it."""
        prepare = {
            "stale tensor": self._stale_tensor,
            "stale layer": self._stale_layer,
            "half of the layers": self._half,
            "transposed expert": self._transposed,
            OF_LOADERS: self._swapped,
            "one bit": self._bit,
            MTP: self._draft,
        }[kind]
        self._strike = dict
        self.hook(None)
        return {"planted": prepare(random.Random(seed))}

    def strike(self) -> dict[str, Any]:
        """After the switch."""
        with torch.no_grad():
            self._strike()
        self._strike = dict
        self.hook(None)
        return {}

    def _held(self) -> dict[str, torch.Tensor]:
        return {name: one for name, one in self.model().named_parameters() if one.numel() > 1}

    def _layers(self) -> list[str]:
        return [name for name, one in self.model().named_modules() if any(True for _ in one.parameters(False))]

    def _stale_tensor(self, chance: random.Random) -> str:
        name = chance.choice(sorted(self._held()))
        old = self._held()[name].detach().clone()
        self._strike = lambda: self._held()[name].copy_(old)
        return name

    def _stale_layer(self, chance: random.Random) -> str:
        name = chance.choice(self._layers())
        self._strike = self._kept(name)
        return name

    def _half(self, chance: random.Random) -> str:
        layers = self._layers()
        strikes = [self._kept(name) for name in chance.sample(layers, len(layers) // 2)]
        self._strike = lambda: [one() for one in strikes]
        return f"{len(strikes)} of {len(layers)} layers"

    def _draft(self, _chance: random.Random) -> str | None:
        draft = getattr(self.model(), "mtp_layer", None)
        own = set() if draft is None else set(draft.modules())
        layers = [name for name in self._layers() if self._module(name) in own]
        strikes = [self._kept(name) for name in layers]
        self._strike = lambda: [one() for one in strikes]
        return f"{len(layers)} layers" if layers else None

    def _transposed(self, chance: random.Random) -> str | None:
        """The elements of one expert, in the order of its transpose."""
        names = sorted(name for name, one in self._held().items() if "experts" in name and one.dim() >= 2)
        if not names:
            return None
        name, place = chance.choice(names), chance.random()

        def strike() -> None:
            parameter = self._held()[name]
            expert = parameter[int(place * len(parameter))] if parameter.dim() == 3 else parameter
            expert.copy_(expert.T.contiguous().reshape(expert.shape))

        self._strike = strike
        return name

    def _bit(self, chance: random.Random) -> str:
        name = chance.choice(sorted(self._held()))
        place, bit = chance.random(), chance.randrange(8)

        def strike() -> None:
            flat = self._held()[name].data.reshape(-1).view(torch.uint8)
            flat[int(place * flat.numel())] ^= 1 << bit

        self._strike = strike
        return name

    def _swapped(self, _chance: random.Random) -> str:
        """A loader that gives each expert's gate what its up projection should have, and the other way round."""
        self.hook(_exchanged)
        return "gate_proj and up_proj of the experts"

    def _kept(self, name: str) -> Callable[[], None]:
        """Puts back what a layer has now: its tensors, and what was made of them and hangs on it."""
        layer = self._module(name)
        tensors = {key: one.detach().clone() for key, one in layer.named_parameters(recurse=False)}
        packed = {key: vars(layer)[key] for key in ("cpu_linear",) if key in vars(layer)}

        def strike() -> None:
            now = self._module(name)
            for key, one in now.named_parameters(recurse=False):
                if key in tensors and one.shape == tensors[key].shape:
                    one.copy_(tensors[key])
            vars(now).update(packed)

        return strike

    def _module(self, name: str) -> nn.Module:
        return dict(self.model().named_modules())[name]


def _exchanged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def partner(name: str) -> str:
        if ".experts." not in name:
            return name
        return name.replace("gate_proj", "*").replace("up_proj", "gate_proj").replace("*", "up_proj")

    return {name: tensors[partner(name)] for name in tensors}


class Plants:
    """Methods for vLLM's workers."""

    def sentinel_arm(self, kind: str, seed: int) -> dict[str, Any]:
        return self._sentinel().arm(kind, seed)

    def sentinel_strike(self) -> dict[str, Any]:
        return self._sentinel().strike()

    def _sentinel(self) -> Planter:
        worker: Any = self
        if not hasattr(worker, "sentinel_planter"):
            standing = worker.weight_transfer_engine.standing
            honest = standing.make.load

            def hook(change: Callable[..., Any] | None) -> None:
                standing.make.load = honest if change is None else _meddling(honest, change)

            worker.sentinel_planter = Planter(lambda: standing.live, hook)
        return worker.sentinel_planter


def _meddling(honest: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, tensors: honest(model, change(dict(tensors)).items())
