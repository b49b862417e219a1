"""Starting from a published checkpoint: a folder in Hugging Face layout with float weights, or in DeepSeek's fp8."""

from __future__ import annotations

from pathlib import Path

from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.model.model import Model
from isthmus.trainer.parts import Receiver


def load_published(model: Model, folder: Path) -> list[str]:
    """Fill `model`, or what this rank holds of it, from the folder, one tensor at a time.

    Returns in words what the folder holds beyond the model, such as an MTP layer that the recipe does without: the
    caller tells the user. Raises IsthmusError naming missing, extra, mis-shaped or quantised tensors, and DamagedFile
    naming a file that is missing or not whole; the model is untouched then.
    """
    with StoredTensors(folder) as stored:
        checkpoint = Checkpoint(stored, model.architecture)
        receive = Receiver(model)
        for name, tensor in checkpoint.tensors(receive.wants):
            receive(name, tensor)
        return checkpoint.left_out
