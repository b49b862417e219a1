"""Qwen2 and Llama against transformers: logits, loss, gradients and generation; what is refused; exact counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isthmus.engines.local.core.runner import Trial
from isthmus.forecast.count import count_parameters, forward_flops
from isthmus.model.documents import Documents
from isthmus.model.model import Model
from isthmus.recipe.architecture import DenseSection, architecture_from_config, parse_architecture
from isthmus.recipe.section import RecipeError
from tests.support.drawn import dense_architectures
from tests.support.plain import document_mask
from tests.support.small import GrowingCache
from tests.support.small_dense import LLAMA3_ROPE, dense_architecture, randomised, theirs

DRAWN = settings(max_examples=40, deadline=None, derandomize=True)


def agrees_with_transformers(architecture: DenseSection, seed: int) -> None:
    ours = randomised(architecture, seed)
    other = theirs(ours)
    tokens = torch.randint(architecture.vocab_size, (2, 50), generator=torch.Generator().manual_seed(seed))
    expected = other(tokens, labels=tokens)
    logits = ours(tokens)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.loss, atol=0, rtol=1e-3)
    loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - gradients[name]).norm()
        if name.endswith("k_proj.bias"):  # the softmax cancels what a bias of the keys does, but for the rotation
            assert difference <= 1e-3 * gradients[name].norm() + 1e-6
        else:
            assert difference <= 1e-3 * gradients[name].norm(), name


@DRAWN
@given(architecture=dense_architectures("qwen2"), seed=st.integers(0, 99))
def test_qwen2_agrees_with_transformers(architecture: DenseSection, seed: int):
    agrees_with_transformers(architecture, seed)


@DRAWN
@given(architecture=dense_architectures("llama"), seed=st.integers(0, 99))
def test_llama_agrees_with_transformers(architecture: DenseSection, seed: int):
    agrees_with_transformers(architecture, seed)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_rows_of_packed_documents_see_only_their_own_document(model_type: str):
    """transformers sees each document alone."""
    model = randomised(dense_architecture(model_type, rope_scaling=LLAMA3_ROPE), seed=3)
    other = theirs(model)
    tokens = torch.randint(89, (1, 30), generator=torch.Generator().manual_seed(3))
    document = torch.tensor([[0] * 11 + [1] * 19])
    positions = torch.cat((torch.arange(11), torch.arange(19)))[None]
    alone = torch.cat([other(part).logits for part in tokens.split([11, 19], dim=1)], dim=1)
    for mask in (document_mask(document), Documents.of(document, heads=4)):
        torch.testing.assert_close(model(tokens, positions, mask), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_with_a_cache_equals_attention_without_in_float64(kv_heads: int):
    model = randomised(dense_architecture(num_key_value_heads=kv_heads), seed=5).double()
    tokens = torch.randint(89, (2, 17), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(17).expand(2, 17)
    caches, steps = [GrowingCache() for _ in range(2)], []
    for start, end in [(0, 9), (9, 10), (10, 17)]:
        steps.append(model.hidden(tokens[:, start:end], positions[:, start:end], caches=caches))
    torch.testing.assert_close(torch.cat(steps, dim=1), model.hidden(tokens), atol=1e-12, rtol=1e-12)


def test_recomputed_layers_give_the_same_gradients():
    model = randomised(dense_architecture(), seed=4)
    tokens = torch.arange(24)[None]
    model(tokens).square().mean().backward()
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for layer in model.model.layers:
        layer.recompute = True
    model(tokens).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, kept[name]), name


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_engine_generates_what_transformers_generates(model_type: str, kv_heads: int):
    model = randomised(dense_architecture(model_type, num_key_value_heads=kv_heads), seed=kv_heads).eval()
    prompts = [[5, 80, 3, 17], [8, 2]]
    other = theirs(model)
    other.generation_config.eos_token_id = None
    trial = Trial(model, sequences=2, length=40)
    assert trial.runner.store.layers[0].shape[1] == 2 * kv_heads * 10
    ours = [list(prompt) for prompt in prompts]
    with torch.inference_mode():
        logits = trial.prefill(prompts)
        for _ in range(20):
            tokens = logits.argmax(-1)
            for row, token in zip(ours, tokens.tolist(), strict=True):
                row.append(token)
            logits = trial.decode(tokens)
        for prompt, row in zip(prompts, ours, strict=True):
            theirs_row = other.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
            assert row == theirs_row[0].tolist()


def test_weights_depend_on_the_seed_alone_and_biases_start_at_zero():
    first, again = (Model(dense_architecture()).initialise(6).state_dict() for _ in range(2))
    other = Model(dense_architecture()).initialise(7).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert name.endswith(".bias") == (not tensor.any())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


COUNTED = {
    "qwen2": dense_architecture("qwen2"),
    "qwen2 tied": dense_architecture("qwen2", tie_word_embeddings=True, num_key_value_heads=1),
    "llama": dense_architecture("llama", head_dim=6),
    "llama with biases": dense_architecture("llama", attention_bias=True, num_key_value_heads=4),
}


@pytest.mark.parametrize("architecture", COUNTED.values(), ids=COUNTED)
def test_counts_are_those_of_the_model(architecture: DenseSection):
    model, tokens = Model(architecture).initialise(0).eval(), torch.zeros(2, 20, dtype=torch.long)
    count = count_parameters(architecture)
    assert count.total == count.active == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)  # torch does not count its fused attention on the CPU
    assert forward_flops(architecture, context=20) * tokens.numel() == counter.get_total_flops()


R1_DISTILL_QWEN_7B = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
R1_DISTILL_LLAMA_8B = {
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(R1_DISTILL_QWEN_7B, 7_615_616_512), (R1_DISTILL_LLAMA_8B, 8_030_261_248)],
    ids=["DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Llama-8B"],
)
def test_published_configurations_have_their_published_size(config: dict, parameters: int):
    """The sizes are those of the safetensors metadata on the Hugging Face hub."""
    architecture = parse_architecture(architecture_from_config(config))
    assert count_parameters(architecture).total == parameters
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Model(architecture).parameters()) == parameters


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (R1_DISTILL_QWEN_7B, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        (R1_DISTILL_QWEN_7B, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (R1_DISTILL_QWEN_7B, {"attention_dropout": 0.1}, r"attention_dropout = 0\.1 is not supported"),
        (R1_DISTILL_QWEN_7B, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; supported: 'silu'"),
        (R1_DISTILL_QWEN_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        (R1_DISTILL_QWEN_7B, {"attention_bias": False}, "has biases on q, k and v"),
        (R1_DISTILL_QWEN_7B, {"num_nextn_predict_layers": 1}, "no multi-token prediction"),
        (R1_DISTILL_QWEN_7B, {"num_key_value_heads": 3}, "must be a multiple"),
        (R1_DISTILL_LLAMA_8B, {"mlp_bias": True}, "mlp_bias = True is not supported"),
        (R1_DISTILL_LLAMA_8B, {"swiglu_limit": 7.0}, r"swiglu_limit = 7\.0 is not supported"),
        (R1_DISTILL_LLAMA_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (R1_DISTILL_LLAMA_8B, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            R1_DISTILL_LLAMA_8B,
            {"rope_scaling": R1_DISTILL_LLAMA_8B["rope_scaling"] | {"attention_factor": 2.0}},
            "attention_factor",
        ),
        (R1_DISTILL_LLAMA_8B, {"head_dim": 63}, "must be even"),
    ],
)
def test_a_setting_that_would_compute_something_else_is_refused(config: dict, change: dict, words: str):
    with pytest.raises(RecipeError, match=words):
        parse_architecture(architecture_from_config(config | change))


def test_old_configurations_without_key_value_heads_have_as_many_as_query_heads():
    old = {key: value for key, value in R1_DISTILL_LLAMA_8B.items() if key != "num_key_value_heads"}
    assert parse_architecture(architecture_from_config(old)).num_key_value_heads == 32
