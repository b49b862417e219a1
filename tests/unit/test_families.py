"""Each family through the gate: converted, captured, verified and sealed; coverage, faults, deltas, several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from isthmus.cli import cli
from isthmus.data.tokenizer import Tokenizer
from isthmus.formats import format_names, get_format
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.formats.updates.delta import WeightSet, apply, encode
from isthmus.model.model import Model
from isthmus.parity.coverage import check_coverage
from isthmus.parity.lint import lint_model
from isthmus.parity.seal import verify_seal
from isthmus.recipe.architecture import GroupedSection
from tests.support.bundles import published
from tests.support.small_dense import FAMILIES, dense_architecture, qwen3_moe_architecture, randomised

every_family = pytest.mark.parametrize("architecture", FAMILIES.values(), ids=FAMILIES)


class TinyTokenizer:
    bos_id, ends = 0, (1,)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def isthmus(*arguments: object) -> str:
    """What a command prints; its error is raised."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


def checkpoint(folder: Path, architecture: GroupedSection) -> Path:
    wide = architecture.model_copy(update={"vocab_size": 300, "initializer_range": 0.1})
    published(folder, randomised(wide, 1), torch.bfloat16)
    Tokenizer.train(["a golden text of some words"], 300).save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    return folder


@every_family
def test_a_checkpoint_is_converted_captured_verified_and_sealed(tmp_path: Path, architecture: GroupedSection):
    source, prompts = checkpoint(tmp_path / "source", architecture), tmp_path / "prompts.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = [{"tokens": torch.randint(300, (24,), generator=generator).tolist()} for _ in range(4)]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    isthmus("convert", source, tmp_path / "b", "--format", "bf16")
    isthmus("capture", tmp_path / "b", "--source", source, "--prompts", prompts)
    isthmus("verify", tmp_path / "b")
    assert verify_seal(tmp_path / "b").tensors.keys() == load_file(tmp_path / "b" / "model.safetensors").keys()


@every_family
@pytest.mark.parametrize("name", ["bf16", "w8a8", "fp8", "mxfp8", "modelslim_dynamic"])
def test_every_tensor_is_accounted_for_and_a_changed_one_named(tmp_path: Path, architecture: GroupedSection, name: str):
    source = randomised(architecture, 2).state_dict()
    write_bundle(tmp_path / "b", name, source, architecture, TinyTokenizer())
    entries, checks = check_coverage(source, tmp_path / "b")
    assert [check.outcome for check in checks] == ["pass"], checks
    assert [entry.source for entry in entries] == list(source)
    stored = load_file(tmp_path / "b" / "model.safetensors")
    changed = next((key for key in reversed(stored) if "k_norm" in key), "model.layers.1.input_layernorm.weight")
    stored[changed] = stored[changed].roll(1)
    save_file(stored, tmp_path / "b" / "model.safetensors")
    _, checks = check_coverage(source, tmp_path / "b")
    (refused,) = (check for check in checks if check.outcome == "fail")
    assert changed.removesuffix(".weight") in (refused.module or "")


def test_a_built_model_without_its_window_head_norm_or_routing_is_named():
    for architecture, path, change, words in (
        (
            dense_architecture("mistral", sliding_window=5),
            "model.layers.1.self_attn",
            lambda module: setattr(module, "layout", module.layout._replace(window=None)),
            "the sliding window is None, the source has 5",
        ),
        (
            dense_architecture("qwen3"),
            "model.layers.0.self_attn.q_norm",
            lambda module: setattr(module, "eps", 1e-3),
            "eps is 0.001",
        ),
        (
            qwen3_moe_architecture(norm_topk_prob=True),
            "model.layers.1.mlp.gate",
            lambda module: setattr(module, "normalise", False),
            "norm_topk_prob is False",
        ),
    ):
        model = Model(architecture).initialise(0)
        assert [check.outcome for check in lint_model(model, architecture)] == ["pass"]
        change(model.get_submodule(path))
        (check,) = lint_model(model, architecture)
        assert (check.outcome, check.module) == ("fail", path) and words in check.detail


@every_family
def test_an_update_changes_a_served_model_into_the_next_version(architecture: GroupedSection):
    base, new = (randomised(architecture, seed).state_dict() for seed in (3, 4))
    versions = [
        WeightSet.of(place, get_format("w8a8").export(state, architecture)) for place, state in enumerate((base, new))
    ]
    found = apply(versions[0], encode(*versions))
    tokens = torch.arange(20)[None]
    models = [get_format("w8a8").build(architecture, one.tensors) for one in (found, versions[1])]
    assert torch.equal(models[0](tokens), models[1](tokens))


def test_formats_know_no_other_names_than_those_of_the_families():
    """A format leaves the norms and routers of these families in float, and the list of what it ignores says so."""
    architecture = FAMILIES["qwen3_moe with a dense layer"]
    for name in format_names():
        layout = get_format(name).layout(architecture)
        wide = {str(layout[f"model.layers.1.{part}.weight"][0]) for part in ("self_attn.q_norm", "mlp.gate")}
        assert wide == {str(layout["model.norm.weight"][0])}, name
    config = get_format("w8a8").quantization_config(architecture)
    assert config is not None and config["ignore"] == ["lm_head", "model.layers.1.mlp.gate"]


def test_a_bundle_of_each_family_reads_as_the_same_model(tmp_path: Path):
    for name, architecture in FAMILIES.items():
        model = randomised(architecture, 5).eval()
        write_bundle(tmp_path / name, "fp32", model.state_dict(), architecture, TinyTokenizer())
        tokens = torch.arange(40)[None]
        assert torch.equal(read_bundle(tmp_path / name).build()(tokens), model(tokens)), name
