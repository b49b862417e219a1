"""From config.json to an architecture: published files, keys that are absent, nested ones, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from isthmus.forecast.count import count_parameters
from isthmus.formats.parts.slices import cut_architecture
from isthmus.model.config import hf_config, rope_amplitude, rope_inverse_frequencies, softmax_scale
from isthmus.model.model import Model
from isthmus.recipe.architecture import (
    MODEL_TYPES,
    AnySection,
    DeepseekSection,
    GroupedSection,
    Qwen3MoeSection,
    architecture_from_config,
    parse_architecture,
)
from isthmus.recipe.section import RecipeError
from tests.support.published_configs import KIMI_K2, PUBLISHED
from tests.support.small_dense import FAMILIES

SIZES = {
    "vocab_size": 64,
    "hidden_size": 4096,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
QWEN, LLAMA = PUBLISHED["DeepSeek-R1-Distill-Qwen-7B"], PUBLISHED["DeepSeek-R1-Distill-Llama-8B"]
QWEN3, MOE = PUBLISHED["Qwen3-8B"], PUBLISHED["Qwen3-30B-A3B"]
MISTRAL = PUBLISHED["Mistral-7B-v0.1"]


def read(config: dict[str, Any], **changes: Any) -> AnySection:
    return parse_architecture(architecture_from_config(config | changes))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_absent_keys_are_what_transformers_takes_them_for(model_type: str):
    ours, theirs = read({"model_type": model_type, **SIZES}), CONFIG_MAPPING[model_type](**SIZES)
    own = {"model_type", "preset", "from_", "rope_scaling", "layer_types", "num_nextn_predict_layers"}
    for name in type(ours).model_fields.keys() - own:
        found = getattr(ours, name)
        if name == "head_dim" and isinstance(ours, GroupedSection):
            found = ours.head_size if getattr(theirs, name, None) else None
        if name == "rope_theta":
            assert found == theirs.rope_parameters["rope_theta"]
        elif hasattr(theirs, name):
            assert found == getattr(theirs, name), name
        else:
            assert name in ("scoring_func", "swiglu_limit", "sliding_window", "attention_bias", "head_dim"), name
    assert ours.num_nextn_predict_layers == 0


def test_deepseeks_routing_without_its_keys_is_that_of_deepseek_v3():
    found = read({"model_type": "deepseek_v3", **SIZES})
    assert isinstance(found, DeepseekSection)
    assert (found.routed_scaling_factor, found.n_group, found.topk_group, found.first_k_dense_replace) == (2.5, 8, 4, 3)
    assert read({"model_type": "deepseek_v3", **SIZES}, q_lora_rank=None).q_lora_rank is None  # pyright: ignore


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_comes_back_from_what_is_written_of_it(name: str):
    architecture = read(PUBLISHED[name])
    written = hf_config(architecture, dtype="bfloat16", eos_token_id=1, bos_token_id=None)
    again = read(written)
    assert hf_config(again, dtype="bfloat16", eos_token_id=1, bos_token_id=None) == written
    assert rope_inverse_frequencies(again) == rope_inverse_frequencies(architecture)
    assert again.cache_width == architecture.cache_width and again.sparse_layers == architecture.sparse_layers
    if rope := PUBLISHED[name].get("rope_scaling"):
        kept = {key: value for key, value in rope.items() if key not in ("type", "rope_type")}
        assert kept.items() <= written["rope_parameters"].items()


def published_size_in_transformers(config: dict[str, Any]) -> int:
    given = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **given)).num_parameters()


def test_kimi_k2_is_a_deepseek_v3_of_a_trillion_parameters():
    architecture = read(KIMI_K2)
    assert isinstance(architecture, DeepseekSection) and architecture.model_type == "deepseek_v3"
    count = count_parameters(architecture)
    assert count.total == published_size_in_transformers(KIMI_K2)
    assert round(count.total / 1e12, 1) == 1.0 and round(count.active / 1e9) == 33
    assert softmax_scale(architecture) == pytest.approx(192**-0.5 * (0.1 * 4.1588830833596715 + 1) ** 2)
    written = hf_config(architecture, dtype="bfloat16", eos_token_id=1, bos_token_id=None)
    assert written["architectures"] == ["DeepseekV3ForCausalLM"] and written["model_type"] == "deepseek_v3"


def test_the_text_model_of_one_that_sees_is_read_from_its_own_table():
    nested = {"model_type": "kimi_k25", "vision_config": {"hidden_size": 1152}, "text_config": KIMI_K2}
    assert read(nested) == read(KIMI_K2)
    seeing = {"model_type": "mistral3", "text_config": PUBLISHED["Mistral-7B-v0.3"], "tie_word_embeddings": True}
    assert read(seeing) == read(PUBLISHED["Mistral-7B-v0.3"])
    with pytest.raises(RecipeError, match=r"'qwen2_5_vl_text' is not read; read: deepseek_v3, .*kimi_k2"):
        architecture_from_config({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}})


def windows(architecture: AnySection) -> list[int | None]:
    assert isinstance(architecture, GroupedSection)
    return [architecture.window_of(index) for index in range(architecture.num_hidden_layers)]


def test_windows_are_those_of_each_family():
    assert windows(read(MISTRAL)) == [4096] * 32
    assert windows(read(PUBLISHED["Mistral-7B-v0.3"])) == [None] * 32
    without = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert windows(read(without)) == [4096] * 32, "as transformers has it"
    assert windows(read(QWEN)) == [None] * 28, "sliding_window counts with use_sliding_window alone"
    assert windows(read(QWEN, use_sliding_window=True, max_window_layers=21)) == [None] * 21 + [4096] * 7
    assert windows(read(QWEN, use_sliding_window=True)) == [None] * 28
    types = ["full_attention", "sliding_attention"] * 18
    assert windows(read(QWEN3, use_sliding_window=True, sliding_window=128, layer_types=types)) == [None, 128] * 18
    assert windows(read(MOE, use_sliding_window=True, sliding_window=128, max_window_layers=48)) == [128] * 48


def test_experts_are_in_the_layers_that_both_keys_leave():
    found = read(MOE, num_hidden_layers=8, decoder_sparse_step=2, mlp_only_layers=[3, 4])
    assert found.sparse_layers == [1, 5, 7]
    assert read(MOE).sparse_layers == list(range(48))
    assert read(MOE, mlp_only_layers=None).sparse_layers == list(range(48))
    saved = {key: value for key, value in MOE.items() if key != "num_experts"} | {"num_local_experts": 64}
    saved_experts = read(saved)
    assert isinstance(saved_experts, Qwen3MoeSection) and saved_experts.num_experts == 64


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_of_a_model_is_described_as_the_layer_that_it_is(name: str, layer: int):
    """Also one without a window of a model that has them, and one without experts of a mixture."""
    whole = FAMILIES[name]
    alone = cut_architecture(whole, range(layer, layer + 1))
    again = read(hf_config(alone, dtype="bfloat16", eos_token_id=1, bos_token_id=None))
    assert windows(again) == [whole.window_of(layer)]
    assert again.is_sparse(0) == whole.is_sparse(layer)
    total = sum(parameter.numel() for parameter in Model(alone).parameters())
    assert count_parameters(again).total == total


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_rope_parameters_may_stand_in_either_layout():
    """rope_scaling and rope_theta of older files, rope_parameters of transformers 5, by type of layer or not."""
    old = read(QWEN3, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
    bare = {key: value for key, value in QWEN3.items() if key not in ("rope_theta", "rope_scaling")}
    new = {**YARN, "rope_theta": 1000000}
    assert read(bare, rope_parameters=new) == old
    assert read(bare, rope_parameters={"full_attention": new}) == old
    assert read(bare, rope_parameters={"full_attention": new, "sliding_attention": dict(new)}) == old
    assert read(bare).rope_theta == 10000.0
    with pytest.raises(RecipeError, match=r"differ by type of layer \(full_attention, sliding_attention\)"):
        read(bare, rope_parameters={"full_attention": new, "sliding_attention": new | {"rope_theta": 10000.0}})


def test_the_original_context_is_the_whole_one_unless_a_key_says_otherwise():
    for given, expected in (({}, 40960), ({"original_max_position_embeddings": 8192}, 8192)):
        found = read(QWEN3, rope_scaling={"type": "yarn", "factor": 2.0}, **given).rope_scaling
        assert found is not None and found.original_max_position_embeddings == expected  # pyright: ignore


def test_qwen_with_yarn_grows_by_a_seventh_and_keeps_its_fast_pairs():
    """0.1 ln 4 + 1; of 64 pairs those that turn 32 times in 32,768 tokens keep their frequency, by the paper's rule."""
    architecture = read(PUBLISHED["Qwen2.5-7B-Instruct with YaRN"])
    assert rope_amplitude(architecture) == pytest.approx(1.1386294361119891)
    plain = rope_inverse_frequencies(architecture.model_copy(update={"rope_scaling": None}))
    ratio = [b / a for a, b in zip(plain, rope_inverse_frequencies(architecture), strict=True)]
    assert ratio[:24] == pytest.approx([1.0] * 24) and ratio[40:] == pytest.approx([0.25] * 24)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention', and there is no"),
        (QWEN, {"layer_types": ["chunked_attention"]}, "'chunked_attention'; supported: full_attention, sliding"),
        (QWEN, {"attention_dropout": 0.1}, r"attention_dropout = 0\.1 is not supported"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; supported: 'silu'"),
        (QWEN, {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope' is not supported; .* yarn, llama3"),
        (QWEN, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "'mrope' is not supported"),
        (QWEN, {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        (QWEN, {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        (QWEN, {"attention_bias": False}, "has biases on q, k and v"),
        (QWEN, {"num_nextn_predict_layers": 1}, "no multi-token prediction"),
        (QWEN, {"num_key_value_heads": 3}, "must be a multiple"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = True is not supported"),
        (LLAMA, {"swiglu_limit": 7.0}, r"swiglu_limit = 7\.0 is not supported"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": LLAMA["rope_scaling"] | {"attention_factor": 2.0}}, "attention_factor"),
        (LLAMA, {"head_dim": 63}, "must be even"),
        (LLAMA, {"sliding_window": 4096}, "a llama model has no sliding window"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "every layer of a mistral has the window"),
        (MISTRAL, {"attention_bias": True}, "a mistral model has no biases"),
        (MOE, {"num_experts_per_tok": 129}, "exceeds the 128 experts"),
        (MOE, {"mlp_only_layers": [48]}, "names layer 48, and there are 48"),
        (KIMI_K2, {"topk_method": "greedy"}, "topk_method = 'greedy' is not supported"),
        (KIMI_K2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
    ],
)
def test_a_setting_that_would_compute_something_else_is_refused(config: dict, change: dict, words: str):
    with pytest.raises(RecipeError, match=words):
        read(config, **change)


def test_old_configurations_without_key_value_heads_have_as_many_as_query_heads():
    old = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    found = read(old)
    assert isinstance(found, GroupedSection) and found.num_key_value_heads == 32
