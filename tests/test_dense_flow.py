"""A published dense checkpoint through the whole story: fine-tuned, trained by RL, handed off, served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from isthmus.data.tokenizer import Tokenizer
from isthmus.formats.files.bundle import read_bundle
from isthmus.recipe.read import load_recipe
from isthmus.records import HandoffRecord, read_weights
from isthmus.run import RunFolder
from isthmus.stages.serve import Serving, open_service
from isthmus.tasks import completion_text, load_tasks, seeded
from tests.support.flow_recipe import isthmus

RECIPE = """
name = "distilled"

[model]
from = "published"

[pools.home]
chip = "cpu"
threads = 1
{away}
[place]
train = ["home"]
rollout = ["{serving}"]
serve = ["{serving}"]

[tasks.countdown]
teacher_give_up = 0.9

[qualify]
matmul_size = 64
memory_mib = 1
repeats = 3
pilot_steps = 2

[[step]]
name = "taught"
kind = "sft"
steps = {sft_steps}
batch_size = 16

[step.optimizer]
name = "adamw"
learning_rate = {rate}

[[step]]
name = "reinforced"
kind = "rl"
from = "taught"
steps = 2
prompts_per_step = 4
samples_per_prompt = 4
max_new_tokens = 24
heldout_problems = 12

[step.optimizer]
name = "adamw"
learning_rate = {rate}

[handoff]
golden_prompts = 6
heldout_problems = 12
max_mean_kl = 0.1
min_top1_agreement = 0.8
max_accuracy_drop = 0.6
"""
RECIPES = Path(__file__).parents[1] / "recipes"
AWAY = """
[pools.away]
chip = "ascend-910b-313t"
rehearsed = true
threads = 1
"""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 384,
    "initializer_range": 0.08,
}


def write_recipe(folder: Path, **values: object) -> Path:
    path = folder / "distilled.toml"
    path.write_text(RECIPE.format(**values), encoding="utf-8")
    return path


def write_checkpoint(folder: Path, kind: type, config: type, **changes: object) -> torch.nn.Module:
    """As transformers writes it: config, sharded weights, tokenizer and template."""
    task = load_tasks(load_recipe(RECIPES / "tiny.toml"))["countdown"]
    chance = seeded("published")
    problems = chance.sample(task.train, 200)
    texts = [problem.prompt + completion_text(*task.worked_example(problem, chance)) for problem in problems]
    folder.mkdir()
    Tokenizer.train(texts, 340).save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = kind(config(vocab_size=352, **SIZES, **tokens, **changes))
    model.save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return model


def sealed_bundle(folder: Path, form: str) -> Path:
    record = RunFolder.open(folder).read_record("parity", HandoffRecord)
    assert record.verdict == "pass" and record.seal_id
    return folder / record.bundles[form]


def agrees_with_transformers(bundle: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).eval()
    tokens = torch.randint(340, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(read_bundle(bundle).build()(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.long
def test_a_qwen2_checkpoint_is_trained_handed_off_and_served(tmp_path: Path):
    write_checkpoint(tmp_path / "published", Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True)
    recipe = write_recipe(tmp_path, away=AWAY, serving="away", sft_steps=30, rate=1e-2)
    result = isthmus("run", recipe, "--run", tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    run = RunFolder.open(tmp_path / "run")
    losses = [event["loss"] for event in run.events("taught", "step")]
    assert losses[-1] < 0.6 * losses[0] and read_weights(run, "taught").steps == 30
    gaps = [event["mismatch_abs"] for event in run.events("reinforced", "step") if "mismatch_abs" in event]
    assert all(0 < gap < 0.05 for gap in gaps)
    assert (tmp_path / "run" / "report.html").is_file()
    agrees_with_transformers(sealed_bundle(tmp_path / "run", "bf16"))
    service = open_service(sealed_bundle(tmp_path / "run", "w8a8"), Serving(threads=1, rehearse="ascend-910b-313t"))
    service.core.stop()
    assert service.identity.format == "w8a8" and service.architecture.model_type == "qwen2"


@pytest.mark.long
def test_a_llama_checkpoint_crosses_unchanged_if_nothing_is_learnt(tmp_path: Path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    published = write_checkpoint(tmp_path / "published", LlamaForCausalLM, LlamaConfig, rope_parameters=rope)
    recipe = write_recipe(tmp_path, away="", serving="home", sft_steps=1, rate=1e-12)
    result = isthmus("run", recipe, "--run", tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    bundle = sealed_bundle(tmp_path / "run", "bf16")
    stored = load_file(bundle / "model.safetensors")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in published.state_dict().items()}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    agrees_with_transformers(bundle)
    assert json.loads((bundle / "config.json").read_text())["rope_parameters"] == rope
