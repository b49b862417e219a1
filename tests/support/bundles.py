"""What tests of bundles share: states, checkpoints, the smallest tokenizer, and the words of a hand-off that passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers.models import WordLevel

from isthmus.formats.files.bundle import file_hashes
from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.parity.seal import Lineage
from isthmus.recipe.architecture import DeepseekSection
from isthmus.records import Check
from isthmus.run import Figure


class TinyTokenizer:
    """The smallest thing with a tokenizer's files."""

    def __init__(self, bos_id: int = 3, eos_id: int = 5):
        self.bos_id, self.ends = bos_id, (eos_id,)

    def save(self, folder: Path) -> None:
        words = WordLevel({f"w{number}": number for number in range(8)}, unk_token="w0")
        BpeTokenizer(words).save(str(folder / "tokenizer.json"))
        config = {"eos_token": f"w{self.ends[0]}", "chat_template": "{{ messages[0].content }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def trained_state(arch: DeepseekSection, seed: int = 0) -> dict[str, torch.Tensor]:
    model = Model(arch).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    for router in model.routers():
        router.e_score_correction_bias.copy_(torch.rand(arch.n_routed_experts, generator=generator) / 3)
    return model.state_dict()


def module_tree(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Linear modules with the published names, as compressed-tensors sees a checkpoint."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        if last != "weight" or tensor.dim() != 2 or path[-1] == "embed_tokens":
            continue
        node = root
        for part in path[:-1]:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        node.add_module(path[-1], torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False))
    return root


def rehash(folder: Path) -> None:
    (folder / "checksums.json").write_text(json.dumps(file_hashes(folder)))


def published(folder: Path, model: Model, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The model's weights as a checkpoint folder, in two files with an index."""
    arch = model.architecture
    config = hf_config(arch, dtype=str(dtype).removeprefix("torch."), eos_token_id=5, bos_token_id=3)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if arch.tie_word_embeddings:
        del tensors["lm_head.weight"]
    folder.mkdir()
    names = list(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def anonymous_mib() -> float:
    """Memory of this process that is not a file's, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def passed(checkpoint: str = "c", **changes) -> dict[str, Any]:
    """What `write_seal` is told of a hand-off that passed."""
    figure = Figure.measured(0.001, "nats/token", "a test", rehearsed=False)
    checks = [Check(layer="tokens", name="mean KL", outcome="pass", figure=figure, limit=figure, detail="")]
    lineage = Lineage(checkpoint_sha256=checkpoint * 64, recipe_sha256="r" * 64, source_pool="home", target_pool="away")
    return {"verdict": "pass", "checks": checks, "lineage": lineage, **changes}
