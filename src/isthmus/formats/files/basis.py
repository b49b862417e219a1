"""What a conversion made of the weights beside rounding them, kept in the bundle so that they can be compared.

`conversion/balance.safetensors` holds the change of basis of a balanced model, `conversion/rounding.safetensors` the
inputs for which GPTQ rounded. They lie in a folder of their own because engines read every safetensors file that lies
beside config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.errors import DamagedFile
from isthmus.formats.calibration.balance import LARGEST_EXPONENT, Balance
from isthmus.formats.calibration.rounding import round_with_calibration, sample_inputs
from isthmus.formats.files.bundle import CONVERSION, read_object
from isthmus.formats.parts.ranges import Calibration

BALANCE, ROUNDING = "conversion/balance.safetensors", "conversion/rounding.safetensors"
_SIDES = ("rows", "columns")


@dataclass(frozen=True)
class Conversion:
    """What was done to the trained weights before and while they were rounded.

    `balance` is the change of basis, one that changes nothing where there was none. `inputs` [S, K] in fp32, by the
    path of each module that GPTQ rounded, are those that it was rounded for.
    """

    balance: Balance = field(default_factory=Balance)
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def round(self, stored: dict[str, Tensor], state: Mapping[str, Tensor], calibration: Calibration) -> None:
        """Round stored int8 weights anew by GPTQ, in place, and remember for which inputs."""
        for name in round_with_calibration(stored, state, calibration):
            path = name.removesuffix(".weight")
            self.inputs[path] = sample_inputs(calibration.gram[path])

    def files(self) -> dict[str, bytes]:
        """What goes into the bundle, by path."""
        balanced = {BALANCE: balance_file(self.balance)} if self.balance else {}
        rounded = {ROUNDING: rounding_file(dict(sorted(self.inputs.items())))} if self.inputs else {}
        return balanced | rounded


def read_conversion(folder: Path) -> Conversion:
    """What a bundle says of its own conversion. Raises DamagedFile if it says that something was done, and not what."""
    told = read_object(folder / CONVERSION) if (folder / CONVERSION).is_file() else {}
    for done, name in ((told.get("balance_alpha") is not None, BALANCE), (told.get("rounding") == "gptq", ROUNDING)):
        if done and not (folder / name).is_file():
            raise DamagedFile(
                f"{folder} has no {name}, so its weights cannot be compared with their source: convert again"
            )
    return Conversion(read_balance(folder), read_rounding(folder))


def balance_file(balance: Balance) -> bytes:
    """The content of `BALANCE`: exponents of two in int8, and who uses which in the metadata."""
    return _file({side: getattr(balance, side) for side in _SIDES})


def read_balance(folder: Path) -> Balance:
    """The change of basis of a bundle; one that changes nothing if the bundle was not balanced.

    Raises DamagedFile if it cannot be read.
    """
    sides = _read(folder / BALANCE, _SIDES)
    for name, exponents in ((name, tensor) for side in sides for name, tensor in side.items()):
        if exponents.dtype != torch.int8 or exponents.dim() != 1 or bool((exponents.abs() > LARGEST_EXPONENT).any()):
            raise DamagedFile(f"{folder / BALANCE}: what is said of {name} are no factors that balancing makes")
    return Balance(*sides)


def rounding_file(inputs: dict[str, Tensor]) -> bytes:
    """The content of `ROUNDING`: inputs [S, K] in bf16, and which module they are of in the metadata."""
    return _file({"inputs": {path: rows.bfloat16() for path, rows in inputs.items()}})


def read_rounding(folder: Path) -> dict[str, Tensor]:
    """Inputs [S, K] by the path of each module that GPTQ rounded, in fp32; empty if none was.

    Raises DamagedFile if they cannot be read.
    """
    (inputs,) = _read(folder / ROUNDING, ("inputs",))
    return {path: rows.float() for path, rows in inputs.items()}


def _file(sides: dict[str, dict[str, Tensor]]) -> bytes:
    """Tensors of one dtype by side and name; equal ones are stored once, under the first of their names."""
    first: dict[bytes, str] = {}
    stored: dict[str, Tensor] = {}
    users: dict[str, dict[str, str]] = {side: {} for side in sides}
    for side, tensors in sides.items():
        for name, tensor in tensors.items():
            whole = tensor.contiguous()
            key = first.setdefault(whole.view(torch.uint8).numpy().tobytes(), f"{name}.{side}")
            users[side][name] = key
            stored.setdefault(key, whole)
    return safetensors.torch.save(stored, {side: json.dumps(names) for side, names in users.items()})


def _read(path: Path, sides: tuple[str, ...]) -> list[dict[str, Tensor]]:
    if not path.is_file():
        return [{} for _ in sides]
    try:
        with safe_open(path, framework="pt") as stored:
            users = [json.loads(stored.metadata()[side]) for side in sides]
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return [{name: tensors[key] for name, key in side.items()} for side in users]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{path} cannot be read: {error!r}") from None
