"""What a chip's tables say of weights as they are stored: of a format that a recipe places, or of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.chips import Chip
from isthmus.chips.rehearse import Profile
from isthmus.errors import IsthmusError
from isthmus.formats import get_format, recognise_format
from isthmus.formats.files.bundle import read_config
from isthmus.recipe.architecture import ModelSection, text_config

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Placed:
    """A format on a chip: why the chip cannot compute in it, and what is known to go wrong; empty if nothing is."""

    refusals: tuple[str, ...]
    cautions: tuple[str, ...]


def placed(form: str, model: ModelSection, profile: Profile) -> Placed:
    """What the rules on dtypes say of the tensors of a format, in the operators that compute in it."""
    stored = {str(dtype).removeprefix("torch.") for dtype, _ in get_format(form).layout(model).values()}
    refusals, cautions = [], []
    for dtype in sorted(stored & profile.dtypes.keys()):
        rule = profile.dtypes[dtype]
        names = [name for name in profile.formats.get(form, ()) if rule.refuses(name)]
        words = f"{dtype}: {rule.behaviour} ({rule.standing}: {rule.source})"
        if names or rule.action == "refuse":
            refusals.append(f"{', '.join(names)} refuses {words}" if names else f"refused is {words}")
        else:
            cautions.append(words)
    return Placed(tuple(refusals), tuple(cautions))


@dataclass(frozen=True)
class StoredWeights:
    """Quantised weights of a checkpoint, in words, and what a chip makes of them.

    `form` is the format by name, None of one that is not read here. `computed` is None where that is not known.
    """

    said: str
    form: str | None
    computed: bool | None
    detail: str
    int8: bool = False


def stored_weights(folder: Path, model: ModelSection, chip: Chip, profile: Profile) -> StoredWeights | None:
    """How the weights of a folder are stored, by its config.json, and whether the chip computes in that.

    None if they are float.
    """
    config = read_config(folder)
    block = config.get("quantization_config") or text_config(config).get("quantization_config")
    if not block:
        return None
    form = _format_of(config, block)
    if form is None:
        method = block.get("quant_method")
        return StoredWeights(f"{method}, which is none of the formats here", None, None, "nothing is known of it")
    dtypes = {dtype for dtype, _ in get_format(form).layout(model).values()} - set(FLOATS)
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    kept = [f"{key} {block[key]}" for key in ("weight_block_size", "scale_fmt", "activation_scheme") if block.get(key)]
    said = f"{form} ({'; '.join([names, *kept])})"
    found, operators = placed(form, model, profile), profile.formats.get(form, ())
    lacking = [name for name in operators if profile.status(name) not in ("native", "generic", "decomposes")]
    int8 = torch.int8 in dtypes
    if found.refusals or lacking:
        why = [*found.refusals, *(f"{name} is {profile.status(name)}" for name in lacking)]
        return StoredWeights(said, form, False, "; ".join(why), int8)
    if chip.formats is not None and form not in chip.formats:
        why = f"{chip.name} computes in {', '.join(chip.formats)}"
        return StoredWeights(said, form, False, "; ".join([why, *found.cautions]), int8)
    by = f"by {', '.join(operators)}" if operators else "no operator that does is in the tables"
    return StoredWeights(said, form, True if operators else None, "; ".join([by, *found.cautions]), int8)


def _format_of(config: dict[str, Any], block: dict[str, Any]) -> str | None:
    """The format that is announced; fp8 whatever the rule of its activations and the size of its blocks."""
    if block.get("quant_method") == "fp8":
        return "fp8"
    try:
        return recognise_format(config).name
    except IsthmusError:
        return None
