"""Which weights a bundle says are quantised: by config.json, or by the description that ModelSlim writes beside it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from isthmus.formats import MODELSLIM

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_NEVER_LINEAR = frozenset({"embed_tokens"})
_NOT_LINEAR_EVERYWHERE = frozenset({"gate"})
"""A router is a linear module in some engines and none in others: an `ignore` list may leave it out."""
_IGNORED = ("ignore", "ignored_layers", "modules_to_not_convert")
_FP8_PART = re.compile(r"(?!eh_proj$).*_proj(_with_mqa)?$")
"""What DeepSeek's fp8 checkpoints, which have no list, quantise: every projection of attention, MLPs and experts
(github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md); eh_proj of the MTP layer is in bf16."""


class Announced:
    """What config.json says of the weights; ModelSlim's description stands in it as its `quantization_config`.

    `quantised` answers for a module: True, False, or None where nothing is said.
    """

    def __init__(self, config: dict[str, Any]):
        self.block: dict[str, Any] = config.get("quantization_config") or {}
        self.by_description = self.block.get("quant_method") == MODELSLIM
        self.dtype = str(config.get("torch_dtype", config.get("dtype"))).removeprefix("torch.")
        found = [self.block[key] for key in _IGNORED if self.block.get(key)]
        self.ignored: list[str] | None = list(found[0]) if found else None

    @property
    def any(self) -> bool:
        """Whether quantised weights are announced at all."""
        return bool(self.block)

    @property
    def powers_of_two(self) -> bool:
        """Whether the scales are announced as powers of two."""
        return self.block.get("scale_fmt") == "ue8m0"

    @property
    def scale_dtype(self) -> str | None:
        """The dtype to whose numbers scales are rounded: in ModelSlim's layout that of the model."""
        return self.dtype if self.by_description else None

    @property
    def weight_block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, where they are announced."""
        size = self.block.get("weight_block_size")
        return (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None

    def quantised(self, module: str) -> bool | None:
        """Whether the weight of a linear module is announced as quantised."""
        last = module.rpartition(".")[2]
        if self.by_description:
            said = self.block.get(f"{module}.weight")
            return None if said is None else said != "FLOAT"
        if not self.block or last in _NEVER_LINEAR:
            return False
        if self.ignored is None:
            return True if self.block.get("quant_method") == "fp8" and _FP8_PART.match(last) else None
        if any(_matches(pattern, module) for pattern in self.ignored):
            return False
        return None if last in _NOT_LINEAR_EVERYWHERE else True


def odd_ones_out(quantised: Mapping[str, bool]) -> dict[str, bool]:
    """Of weights by module, those that are not stored as most of their kind are: quantised among float or the reverse.

    A kind is the last part of a path, such as `down_proj`. Half against half names none.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for module in quantised:
        kinds[module.rpartition(".")[2]].append(module)
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
