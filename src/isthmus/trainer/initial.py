"""Starting from a published checkpoint: safetensors files in Hugging Face layout, float weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.model.model import Model


def load_published(model: Model, folder: Path) -> None:
    """Load every tensor of `model` from the folder. Raises IsthmusError naming missing, extra or mis-shaped tensors."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            stored.update(load_file(path))
        except SafetensorError as error:
            raise DamagedFile(f"{path} is not a whole safetensors file: {error}") from None
    if not stored:
        raise IsthmusError(f"{folder} holds no .safetensors files")
    wanted = model.state_dict()
    for copy in _shared_copies(model):
        stored.pop(copy, None)
    problems = [f"missing {name}" for name in wanted.keys() - stored.keys()]
    problems += [f"unexpected {name}" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, should be {tuple(wanted[name].shape)}"
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != wanted[name].shape
    ]
    problems += [
        f"{name} is quantised ({stored[name].dtype})" for name in stored if not stored[name].is_floating_point()
    ]
    if problems:
        raise IsthmusError(f"{folder} does not fit its config.json: " + "; ".join(sorted(problems)[:8]))
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})


def _shared_copies(model: Model) -> list[str]:
    """What published checkpoints keep twice: the embedding and the head of the MTP layer, and a tied head."""
    prefix = f"model.layers.{model.architecture.num_hidden_layers}"
    return [f"{prefix}.embed_tokens.weight", f"{prefix}.shared_head.head.weight"]
