"""Storage formats of weights: one file per format, found by its file name.

A format turns the trainer's fp32 state into the tensors that are stored or sent, and builds from these a model that
computes on the CPU with the numerics of the format. `fp32` is the reference of all others.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol

from isthmus.errors import IsthmusError, suggestion
from isthmus.recipe.architecture import ModelSection

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from isthmus.formats.parts.ranges import Calibration
    from isthmus.model.model import Model

Layout = dict[str, "tuple[torch.dtype, tuple[int, ...]]"]
DESCRIPTION, MODELSLIM = "quant_model_description.json", "modelslim"
"""ModelSlim's file beside config.json, and the quant_method under which its content is passed on."""


class Format(Protocol):
    """One storage format. A file `formats/NAME.py` holds one in its variable `FORMAT`."""

    name: str
    dtype: str
    """What `torch_dtype` in config.json says: "float32" or "bfloat16"."""

    needs_calibration: bool
    """Whether `export` must be given what the inputs of the model's modules look like."""

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        """What one tensor with its published name becomes: stored tensors, contiguous. None if it is not stored.

        The tensor may have any float dtype. Raises IsthmusError if a calibration is needed and absent.
        """
        ...

    def export(
        self, state: dict[str, Tensor], architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        """`export_one` of every tensor of a state."""
        ...

    def layout(self, architecture: ModelSection) -> Layout:
        """dtype and shape of every tensor that `export` stores for the whole state of this architecture."""
        ...

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        """The block of that name in config.json, or None."""
        ...

    def extra_files(self, architecture: ModelSection) -> dict[str, bytes]:
        """Files that this format has beside config.json and the weights, by name."""
        ...

    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a config.json, as `bundle.read_config` gives it, announces this format."""
        ...

    def as_announced(self, config: dict[str, Any]) -> Format:
        """This format with the choices that a config which it recognises leaves to each model."""
        ...

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        """A model for inference on the CPU from stored tensors, all of which it needs."""
        ...


def format_names() -> list[str]:
    """Names of the formats, which are the names of their files; loads none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def get_format(name: str) -> Format:
    """The format of that name, loaded; raises IsthmusError as `check_format_name` does."""
    check_format_name(name)
    return importlib.import_module(f"{__name__}.{name}").FORMAT


def check_format_name(name: str) -> None:
    """Raise IsthmusError with a suggestion if there is no format of that name; loads nothing."""
    names = format_names()
    if name not in names:
        raise IsthmusError(f"unknown format {name!r}{suggestion(name, names)}")


def recognise_format(config: dict[str, Any]) -> Format:
    """The format that a config.json, as `bundle.read_config` gives it, announces. Raises IsthmusError if none does."""
    for name in format_names():
        if get_format(name).recognises(config):
            return get_format(name).as_announced(config)
    found = config.get("quantization_config") or {}
    quantization = found.get("quant_method", "none")
    if quantization == MODELSLIM:
        kinds = {str(kind) for name, kind in found.items() if name.endswith(".weight")}
        quantization = f"{quantization} ({', '.join(sorted(kinds))})"
    raise IsthmusError(
        f"config.json announces dtype {config.get('torch_dtype', config.get('dtype'))!r} with quantisation "
        f"{quantization!r}; the formats read here are {', '.join(format_names())}"
    )
