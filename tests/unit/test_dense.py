"""Qwen2, Qwen3, Llama and Mistral against transformers: logits, loss, gradients and generation; exact counts."""

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
from isthmus.recipe.architecture import GroupedSection, architecture_from_config, parse_architecture
from tests.support.against_transformers import published_gradients, transformers_gradients
from tests.support.drawn import dense_architectures
from tests.support.plain import document_mask
from tests.support.published_configs import PUBLISHED
from tests.support.small import GrowingCache
from tests.support.small_dense import (
    FAMILIES,
    LLAMA3_ROPE,
    dense_architecture,
    qwen3_moe_architecture,
    randomised,
    theirs,
)

DRAWN = settings(max_examples=25, deadline=None, derandomize=True)


def agrees_with_transformers(architecture: GroupedSection, seed: int) -> None:
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
    gradients, found = transformers_gradients(other), published_gradients(ours)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        difference = (found[name] - gradient).norm()
        # The softmax cancels what a bias of the keys does, but for the rotation, and all in a window of one token.
        assert difference <= 1e-3 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "mistral", "qwen3_moe"])
@DRAWN
@given(data=st.data(), seed=st.integers(0, 99))
def test_every_family_agrees_with_transformers(family: str, data: st.DataObject, seed: int):
    agrees_with_transformers(data.draw(dense_architectures(family)), seed)


KINDS: dict[str, GroupedSection] = {
    "qwen2": dense_architecture("qwen2", rope_scaling=LLAMA3_ROPE),
    "llama": dense_architecture("llama", rope_scaling=LLAMA3_ROPE),
    **FAMILIES,
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_packed_documents_see_only_their_own_document(name: str):
    """transformers sees each document alone."""
    model = randomised(KINDS[name], seed=3)
    other = theirs(model)
    tokens = torch.randint(89, (1, 30), generator=torch.Generator().manual_seed(3))
    document = torch.tensor([[0] * 11 + [1] * 19])
    positions = torch.cat((torch.arange(11), torch.arange(19)))[None]
    alone = torch.cat([other(part).logits for part in tokens.split([11, 19], dim=1)], dim=1)
    for mask in (document_mask(document), Documents.of(document, heads=4)):
        torch.testing.assert_close(model(tokens, positions, mask), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [300, 5])
def test_a_long_document_has_the_window_of_a_short_one(length: int):
    """Rows beyond 256 tokens take a fused kernel, shorter ones do not."""
    model = randomised(dense_architecture("mistral", sliding_window=4, max_position_embeddings=300), seed=3)
    tokens = torch.randint(89, (1, length), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(length)[None]
    document = torch.zeros(1, length, dtype=torch.long)
    found = model(tokens, positions, Documents.of(document, heads=4))
    torch.testing.assert_close(found, model(tokens), atol=1e-4, rtol=0)
    tokens[0, 0] = (tokens[0, 0] + 1) % 89
    changed = (model(tokens) - found).abs().amax(-1)[0] > 1e-4
    assert changed.nonzero().max() == min(2 * (4 - 1), length - 1), "two layers see twice as far"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_attention_with_a_cache_equals_attention_without_in_float64(name: str, kv_heads: int):
    changed = {**KINDS[name].model_dump(exclude_none=True), "num_key_value_heads": kv_heads}
    model = randomised(parse_architecture(changed), seed=5).double()
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


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_engine_generates_what_transformers_generates(name: str, kv_heads: int):
    changed = {**KINDS[name].model_dump(exclude_none=True), "num_key_value_heads": kv_heads}
    model = randomised(parse_architecture(changed), seed=kv_heads).eval()
    prompts = [[5, 80, 3, 17], [8, 2]]
    other = theirs(model)
    other.generation_config.eos_token_id = None
    trial = Trial(model, sequences=2, length=40)
    assert trial.runner.store.layers[0].shape[1] == 2 * kv_heads * model.architecture.rotary_size
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
    "qwen3": dense_architecture("qwen3", head_dim=12, tie_word_embeddings=True),
    "qwen3 with biases": dense_architecture("qwen3", attention_bias=True),
    "mistral": dense_architecture("mistral", sliding_window=20),
    "qwen3_moe": qwen3_moe_architecture(head_dim=12),
    "qwen3_moe with a dense layer": qwen3_moe_architecture(decoder_sparse_step=2),
}


@pytest.mark.parametrize("architecture", COUNTED.values(), ids=COUNTED)
def test_counts_are_those_of_the_model_and_of_transformers(architecture: GroupedSection):
    model, tokens = Model(architecture).initialise(0).eval(), torch.zeros(2, 20, dtype=torch.long)
    count = count_parameters(architecture)
    assert count.total == sum(parameter.numel() for parameter in model.parameters()) == theirs(model).num_parameters()
    experts = [parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name]
    assert count.routed_experts == sum(experts) and count.active == count.total - sum(experts) * 4 / 6
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)  # torch does not count its fused attention on the CPU
    assert forward_flops(architecture, context=20) * tokens.numel() == counter.get_total_flops()


def test_a_window_bounds_what_is_counted_in_its_layers():
    types = ["full_attention", "sliding_attention"]
    full, windowed = dense_architecture("qwen2"), dense_architecture("qwen2", sliding_window=7, layer_types=types)
    both = [forward_flops(one, context=100) for one in (full, windowed)]
    assert both[0] - both[1] == 4 * (100 - 7) * 40
    assert forward_flops(windowed, context=7) == forward_flops(full, context=7)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
        ("Qwen2.5-7B-Instruct with YaRN", 7_615_616_512),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Mistral-7B-v0.1", 7_241_732_096),
        ("Mistral-7B-v0.3", 7_248_023_552),
    ],
)
def test_published_configurations_have_their_published_size(name: str, parameters: int):
    """The sizes are those of the safetensors metadata on the Hugging Face hub, without the copy of a tied head."""
    architecture = parse_architecture(architecture_from_config(PUBLISHED[name]))
    assert count_parameters(architecture).total == parameters
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Model(architecture).parameters()) == parameters
