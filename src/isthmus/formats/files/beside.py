"""The files beside the weights of a checkpoint: each is carried into the bundle, or left out for a reason that is told.

What is unknown is carried: a vocabulary can have any name, and code that reads it, too.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from isthmus.formats import DESCRIPTION
from isthmus.formats.files.bundle import CHECKSUMS, CONVERSION, SEAL
from isthmus.formats.files.published import CONFIG
from isthmus.formats.files.stream import INDEX

CARRIED_FOLDERS = ("additional_chat_templates",)
_REASONS = (
    (("*.safetensors", "*.safetensors.index.json", INDEX), "its weights are converted"),
    ((CONFIG, "generation_config.json"), "written anew"),
    (
        ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.h5", "*.msgpack"),
        "weights in another layout",
    ),
    (("*.ot", "*.tflite", "*.mlmodel", "*.npz", "*.pdparams"), "weights in another layout"),
    (("modeling_*.py", "configuration_*.py"), "code of the model, which config.json of a bundle does not name"),
    ((DESCRIPTION, "hf_quant_config.json", "quant*_config.json", "recipe.yaml"), "says how the source was quantised"),
    (
        (CHECKSUMS, CONVERSION, SEAL, "manifest.json", "verdict.json", "golden.json", "examples.json", "slice.json"),
        "speaks of the source as a bundle",
    ),
    (("*.md", "*.png", "*.jpg", "*.jpeg", "*.svg", "*.gif", "*.webp", "*.pdf", ".*"), "documentation"),
)


class Beside(NamedTuple):
    """The names of a folder's files that a bundle carries, and of the others, each with the reason."""

    carried: list[str]
    left_out: dict[str, str]

    def copy(self, source: Path, target: Path) -> None:
        """Copy what is carried."""
        for name in self.carried:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def beside_weights(folder: Path) -> Beside:
    """Account for every file of a checkpoint or bundle, and for every folder as a whole.

    Licences and notices are carried: most ask for it.
    """
    carried: list[str] = []
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name in CARRIED_FOLDERS:
                carried += [f"{path.name}/{one.name}" for one in sorted(path.iterdir()) if one.is_file()]
            else:
                left_out[f"{path.name}/"] = "a folder"
        elif reason := _reason(path.name):
            left_out[path.name] = reason
        else:
            carried.append(path.name)
    return Beside(carried, left_out)


def _reason(name: str) -> str | None:
    if name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
        return None
    return next((reason for patterns, reason in _REASONS if any(fnmatch(name, one) for one in patterns)), None)
