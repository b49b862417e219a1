"""Lint of config.json and of built models, against every number that can be lost on the way."""

from __future__ import annotations

import csv
import json
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.chips import Rule, load_chips, rules_for
from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.model.model import Model
from isthmus.parity.lint import BUILT, CONFIGURED, STORED, lint_config, lint_model
from isthmus.parity.manifest import write_manifest
from isthmus.recipe.architecture import DenseSection, Llama3Scaling, YarnScaling
from tests.support.bundles import TinyTokenizer
from tests.support.small import architecture

YARN = YarnScaling(
    type="yarn",
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
)
ARCHITECTURE = architecture(
    routed_scaling_factor=2.5, swiglu_limit=7.0, rope_scaling=YARN.model_dump(), q_lora_rank=20, rms_norm_eps=1e-5
)
DENSE = DenseSection(
    model_type="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_scaling=Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
)
EXPERT = "model.layers.1.mlp.experts.3.down_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    state, folders = Model(ARCHITECTURE).initialise(0).state_dict(), {}
    for name in ("bf16", "w8a8"):
        folders[name] = tmp_path_factory.mktemp("lint") / name
        write_bundle(folders[name], name, state, ARCHITECTURE, TinyTokenizer(0, 1))
        write_manifest(folders[name], architecture=ARCHITECTURE)
    return folders


@pytest.fixture(params=["bf16", "w8a8"])
def bundle(request, written, tmp_path) -> Path:
    return copied(written[request.param], tmp_path)


@pytest.fixture
def w8a8(written, tmp_path) -> Path:
    return copied(written["w8a8"], tmp_path)


def copied(source: Path, parent: Path) -> Path:
    folder = parent / "copy"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def failed(checks) -> list[str]:
    return [check.name for check in checks if check.outcome == "fail"]


def test_a_healthy_bundle_passes_every_check(bundle):
    checks = lint_config(bundle)
    assert [check.name for check in checks] == [CONFIGURED, STORED] and {check.outcome for check in checks} == {"pass"}
    assert {check.layer for check in checks} == {"config"}


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2", "rope_scaling": None}, {"tie_word_embeddings": True}])
def test_a_healthy_dense_bundle_passes(changes, tmp_path):
    dense = DENSE.model_copy(update=changes)
    write_bundle(tmp_path / "b", "w8a8", Model(dense).initialise(0).state_dict(), dense, TinyTokenizer(0, 1))
    write_manifest(tmp_path / "b", architecture=dense)
    assert {check.outcome for check in lint_config(tmp_path / "b")} == {"pass"}
    configure(tmp_path / "b", head_dim=16)
    assert failed(lint_config(tmp_path / "b"))


def test_a_list_that_leaves_every_module_in_float_is_not_left_over(written, tmp_path):
    folder = copied(written["bf16"], tmp_path)
    modules = [name.removesuffix(".weight") for name in load_file(folder / "model.safetensors")]
    configure(folder, quantization_config={"quant_method": "compressed-tensors", "ignore": modules})
    assert not failed(lint_config(folder))


CHANGES = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 3,
    "norm_topk_prob": False,
    "swiglu_limit": ...,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
    "num_nextn_predict_layers": 0,
    "vocab_size": 96,
    "rope_interleave": False,
    "qk_rope_head_dim": 4,
    "max_position_embeddings": 64,
    "num_key_value_heads": 1,
    "hidden_act": "gelu",
    "topk_method": "greedy",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
}


@pytest.mark.parametrize("key", CHANGES)
def test_every_number_that_changes_the_model_is_compared(w8a8, key):
    changes = {key: CHANGES[key]}
    if key == "rope_scaling":
        changes["rope_parameters"] = {"rope_theta": ARCHITECTURE.rope_theta, "rope_type": "default"}
    if key == "rope_theta":
        changes["rope_parameters"] = ...
    configure(w8a8, **changes)
    checks = lint_config(w8a8)
    assert CONFIGURED in failed(checks)
    assert any(key in check.detail for check in checks if check.outcome == "fail")


def test_two_places_for_rope_that_disagree(w8a8):
    configure(w8a8, rope_theta=10000.0)
    assert failed(lint_config(w8a8)) == [CONFIGURED]


def test_a_key_that_is_left_to_defaults_is_a_risk_and_no_failure(w8a8):
    configure(w8a8, norm_topk_prob=...)
    checks = lint_config(w8a8)
    assert checks[0].outcome == "caution" and "norm_topk_prob" in checks[0].detail and not failed(checks)


def test_without_a_source_nothing_is_claimed(w8a8):
    (w8a8 / "manifest.json").unlink()
    assert lint_config(w8a8)[0].outcome == "unknown"
    assert lint_config(w8a8, ARCHITECTURE)[0].outcome == "pass"
    assert failed(lint_config(w8a8, architecture(rms_norm_eps=1e-4)))


def test_leftover_quantization_beside_float_weights(written, tmp_path):
    folder = copied(written["bf16"], tmp_path)
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert "weight_scale_inv" in next(check.detail for check in lint_config(folder) if check.outcome == "fail")


def test_quantised_weights_that_nothing_announces(w8a8):
    configure(w8a8, quantization_config=...)
    checks = [check for check in lint_config(w8a8) if check.outcome == "fail"]
    assert checks and all("no quantization_config" in check.detail for check in checks)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


STORED_FAULTS = {
    "a layer in bf16": (EXPERT, lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"].bfloat16()})),
    "a scale missing": (EXPERT, lambda t: t.pop(f"{EXPERT}.weight_scale")),
    "an ignored layer in int8": (
        "model.layers.0.self_attn.kv_b_proj",
        lambda t: t.update(
            {
                "model.layers.0.self_attn.kv_b_proj.weight": torch.ones(88, 16, dtype=torch.int8),
                "model.layers.0.self_attn.kv_b_proj.weight_scale": torch.ones(88, 1),
            }
        ),
    ),
    "a norm in fp16": ("model.norm", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()})),
    "the head missing": ("lm_head", lambda t: t.pop("lm_head.weight")),
    "an embedding of another size": (
        "model.embed_tokens",
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][1:].clone()}),
    ),
    "an MTP layer missing": (
        "model.layers.3",
        lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.3.")],
    ),
}


@pytest.mark.parametrize("fault", STORED_FAULTS)
def test_what_is_stored_fits_what_is_announced(w8a8, fault):
    module, change = STORED_FAULTS[fault]
    rewrite(w8a8, change)
    assert [c.module for c in lint_config(w8a8) if c.outcome == "fail"] == [module]


def test_an_ignore_list_that_lost_a_module(w8a8):
    config = json.loads((w8a8 / "config.json").read_text())
    config["quantization_config"]["ignore"].remove("model.layers.1.self_attn.kv_b_proj")
    (w8a8 / "config.json").write_text(json.dumps(config))
    assert [c.module for c in lint_config(w8a8) if c.outcome == "fail"] == ["model.layers.1.self_attn.kv_b_proj"]


# Models as they were built.


def built(written) -> Model:
    return read_bundle(written["w8a8"]).build()


@pytest.mark.parametrize("name", ["bf16", "w8a8"])
def test_a_healthy_model_passes_in_any_dtype(written, name):
    model = read_bundle(written[name]).build()
    assert [(check.name, check.outcome) for check in lint_model(model, ARCHITECTURE)] == [(BUILT, "pass")]
    assert lint_model(model.to(torch.bfloat16), ARCHITECTURE)[0].outcome == "pass"
    dense = Model(DENSE)
    assert [check.outcome for check in lint_model(dense, DENSE)] == ["pass"]


def change_table(model: Model, other) -> None:
    model.model.rotary.cos = Model(other).model.rotary.cos


MODEL_FAULTS = {
    "model.layers.1.input_layernorm": lambda m: setattr(m.model.layers[1].input_layernorm, "eps", 1e-1),
    "model.layers.1.self_attn.kv_a_layernorm": lambda m: setattr(m.model.layers[1].self_attn.kv_a_layernorm, "eps", 0),
    "model.norm": lambda m: setattr(m.model.norm, "eps", 1e-6),
    "model.layers.2.self_attn": lambda m: setattr(m.model.layers[2].self_attn, "scale", 20**-0.5),
    "model.layers.1.mlp.gate": lambda m: setattr(m.model.layers[1].mlp.gate, "scaling", 1.0),
    "model.layers.2.mlp.gate": lambda m: setattr(m.model.layers[2].mlp.gate, "topk_group", 4),
    "model.layers.3.mlp.gate": lambda m: setattr(m.model.layers[3].mlp.gate, "normalise", False),
    "model.layers.1.mlp.experts": lambda m: setattr(m.model.layers[1].mlp.experts, "limit", None),
    "model.layers.1.mlp.shared_experts": lambda m: setattr(m.model.layers[1].mlp.shared_experts, "limit", None),
    "model.layers.0.mlp": lambda m: setattr(m.model.layers[0].mlp, "limit", 8.0),
    "model.rotary": lambda m: change_table(m, architecture(rope_theta=1000.0)),
}


@pytest.mark.parametrize("module", MODEL_FAULTS)
def test_a_hyperparameter_that_was_lost_names_its_module(written, module):
    model = built(written)
    MODEL_FAULTS[module](model)
    assert [(c.outcome, c.module) for c in lint_model(model, ARCHITECTURE)] == [("fail", module)]


def test_lost_scaling_of_positions_is_seen_in_the_tables_and_the_scores(written):
    plain = Model(ARCHITECTURE.model_copy(update={"rope_scaling": None}))
    modules = {check.module for check in lint_model(plain, ARCHITECTURE)}
    assert "model.rotary" in modules and "model.layers.0.self_attn" in modules
    assert lint_model(Model(DENSE.model_copy(update={"rope_scaling": None})), DENSE)[0].module == "model.rotary"


# The target's rules.


def outcomes(folder: Path, chip: str) -> dict[str, str]:
    return {check.detail.split(" ")[0]: check.outcome for check in lint_config(folder, chip=chip)[2:]}


def test_rules_of_the_target(written):
    found = outcomes(written["w8a8"], "ascend-910b-313t")
    assert found == {"num_attention_heads": "caution", "n_routed_experts": "caution", "swiglu_limit": "caution"}
    assert lint_config(written["w8a8"], chip="h100-sxm")[2].outcome == "pass"
    with pytest.raises(IsthmusError, match="unknown chip"):
        lint_config(written["w8a8"], chip="nothing")


def table() -> list[Rule]:
    text = resources.files("isthmus.chips").joinpath("rules.csv").read_text(encoding="utf-8")
    return [Rule(**row) for row in csv.DictReader(text.splitlines())]


@pytest.mark.parametrize("rule", table(), ids=lambda rule: f"{rule.chips} {rule.about} {rule.key}")
def test_a_rule_is_held_against_models_that_have_what_it_is_about(rule: Rule):
    """Each has a source, a chip and a key that exist; a dense model has no latent attention, no router, no experts."""
    keys = {*type(ARCHITECTURE).model_fields, "format"}
    assert rule.source and rule.why and rule.key in keys and rule.breach in ("fail", "caution")
    assert rule.standing in ("documented", "read in code", "assumed")
    slugs = [slug for slug in load_chips() if fnmatch(slug, rule.chips)]
    mixture, dense = (tuple(Model(one).state_dict()) for one in (ARCHITECTURE, DENSE))
    assert slugs and all(rule in rules_for(slug, mixture) for slug in slugs)
    assert all((rule in rules_for(slug, dense)) == (rule.about == "any") for slug in slugs)


def test_rules_of_formats_are_about_every_model():
    fp8 = next(rule for rule in rules_for("ascend-910c-560t", ()) if rule.key == "format")
    assert fp8.breach == "fail" and not fp8.holds("fp8") and fp8.holds("w8a8")


@pytest.mark.parametrize("chip", ["ascend-910b-313t", "mi308x"])
def test_heads_of_a_grouped_query_model_are_no_risk(tmp_path: Path, chip: str):
    """28 heads are none of those that fused latent attention takes, and this model has no latent attention."""
    dense = DENSE.model_copy(update={"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 112})
    write_bundle(tmp_path / "b", "bf16", Model(dense).initialise(0).state_dict(), dense, TinyTokenizer(0, 1))
    write_manifest(tmp_path / "b", architecture=dense)
    assert [check.outcome for check in lint_config(tmp_path / "b", chip=chip)[2:]] == ["pass"]


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [("32 64", 64, 16), ("<=32", 32, 33), ("none", None, 7.0), ("!fp8 !mxfp8", "bf16", "fp8")],
)
def test_what_a_rule_allows(allowed, good, bad):
    rule = Rule("*", "any", "k", allowed, "fail", "assumed", "s", "w")
    assert rule.holds(good) and not rule.holds(bad)
