"""Which weights a bundle says are quantised: by config.json, or by the description that ModelSlim writes beside it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import DamagedFile

DESCRIPTION = "quant_model_description.json"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_NEVER_LINEAR = frozenset({"embed_tokens"})
_NOT_LINEAR_EVERYWHERE = frozenset({"gate"})
"""A router is a linear module in some engines and none in others: an `ignore` list may leave it out."""
_IGNORED = ("ignore", "ignored_layers", "modules_to_not_convert")


class Announced:
    """What the files around the weights say about them.

    `quantised` answers for a module: True, False, or None where nothing is said.
    """

    def __init__(self, config: dict[str, Any], description: dict[str, Any] | None = None):
        self.block: dict[str, Any] = config.get("quantization_config") or {}
        self.description = description
        found = [self.block[key] for key in _IGNORED if self.block.get(key)]
        self.ignored: list[str] | None = list(found[0]) if found else None

    @property
    def any(self) -> bool:
        """Whether quantised weights are announced at all."""
        return bool(self.block) or self.description is not None

    @property
    def powers_of_two(self) -> bool:
        """Whether the scales are announced as powers of two."""
        return self.block.get("scale_fmt") == "ue8m0"

    @property
    def weight_block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, where they are announced."""
        size = self.block.get("weight_block_size")
        return (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None

    def quantised(self, module: str) -> bool | None:
        """Whether the weight of a linear module is announced as quantised."""
        last = module.rpartition(".")[2]
        if self.description is not None:
            said = self.description.get(f"{module}.weight")
            return None if said is None else said != "FLOAT"
        if not self.block or last in _NEVER_LINEAR:
            return False
        if self.ignored is None:
            return None
        if any(_matches(pattern, module) for pattern in self.ignored):
            return False
        return None if last in _NOT_LINEAR_EVERYWHERE else True


def read_announced(bundle_folder: Path, config: dict[str, Any]) -> Announced:
    """What a bundle says of its weights. Raises DamagedFile if ModelSlim's description cannot be read."""
    path = bundle_folder / DESCRIPTION
    if not path.is_file():
        return Announced(config)
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFile(f"{path} is not valid JSON: {error}") from None
    if not isinstance(description, dict):
        raise DamagedFile(f"{path} is not a JSON object")
    return Announced(config, description)


def odd_ones_out(quantised: Mapping[str, bool]) -> dict[str, bool]:
    """Of weights by module, those that are not stored as most of their kind are: quantised among float or the reverse.

    A kind is a path with its numbers left out, such as `model.layers.*.mlp.down_proj`. Half against half names none.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for module in quantised:
        kinds[re.sub(r"\.\d+(?=\.|$)", ".*", module)].append(module)
    odd = {}
    for modules in kinds.values():
        share = sum(quantised[module] for module in modules) / len(modules)
        if share not in (0.0, 0.5, 1.0):
            odd |= {module: quantised[module] for module in modules if quantised[module] != (share > 0.5)}
    return odd


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.")
