"""The model against transformers, against float64, and against loops."""

from __future__ import annotations

import pytest
import torch
from small import GrowingCache, architecture
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from isthmus.model.attention import LatentAttention, RotaryTable
from isthmus.model.config import hf_config
from isthmus.model.model import Model, causal_mask, document_mask
from isthmus.model.moe import Dispatch, Experts, Router, sequence_balance_loss
from isthmus.recipe import ModelSection, YarnScaling

CONFIGURATIONS = {
    "plain": {},
    "compressed-q": {"q_lora_rank": 20, "first_k_dense_replace": 2, "num_attention_heads": 3},
    "yarn": {
        "rope_scaling": YarnScaling(factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.7),
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": False,
        "n_shared_experts": 2,
    },
}


def randomised(arch: ModelSection, seed: int) -> Model:
    model = Model(arch).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
        for router in model.routers():
            # Positive biases: where they are negative, transformers masks closed groups with 0.0 and errs.
            router.e_score_correction_bias.copy_(torch.rand(router.e_score_correction_bias.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_equal_transformers(name):
    arch = architecture(**CONFIGURATIONS[name])
    model = randomised(arch, seed=len(name))
    config = DeepseekV3Config(**hf_config(arch, dtype="float32", bos_token_id=0, eos_token_id=1))
    config._attn_implementation = "eager"
    reference = DeepseekV3ForCausalLM(config).eval()
    ours = {key: value for key, value in model.state_dict().items() if f"layers.{arch.num_hidden_layers}." not in key}
    reference.load_state_dict(to_transformers_layout(ours, reference), strict=True)
    tokens = torch.randint(arch.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)


def to_transformers_layout(state, reference):
    """transformers 5 stacks experts in memory; its checkpoints on disk keep the published names."""
    if "model.layers.1.mlp.experts.gate_up_proj" not in reference.state_dict() and not any(
        "experts.gate_up_proj" in key for key in reference.state_dict()
    ):
        return state
    stacked = {key: value for key, value in state.items() if ".mlp.experts." not in key}
    for key in reference.state_dict():
        prefix, _, part = key.rpartition(".")
        if part in ("gate_up_proj", "down_proj") and prefix.endswith("experts"):
            count = sum(1 for name in state if name.startswith(f"{prefix}.") and name.endswith("down_proj.weight"))
            rows = [
                torch.cat((state[f"{prefix}.{i}.gate_proj.weight"], state[f"{prefix}.{i}.up_proj.weight"]))
                if part == "gate_up_proj"
                else state[f"{prefix}.{i}.down_proj.weight"]
                for i in range(count)
            ]
            stacked[key] = torch.stack(rows)
    return stacked


def test_absorbed_attention_equals_naive_in_float64():
    arch = architecture(q_lora_rank=20)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        attention, rotary = LatentAttention(arch), RotaryTable(arch)
        x = torch.randn(2, 17, arch.hidden_size)
        positions = torch.arange(17).expand(2, 17)
        naive = attention(x, rotary(positions), causal_mask(17))
        cache, steps = GrowingCache(), []
        chunks = [(0, 9), (9, 10), (10, 17)]
        for start, end in chunks:
            mask = causal_mask(17)[..., start:end, :end]
            steps.append(attention(x[:, start:end], rotary(positions[:, start:end]), mask, cache))
    finally:
        torch.set_default_dtype(torch.float32)
    assert cache.latents.shape[-1] == arch.kv_lora_rank + arch.qk_rope_head_dim
    torch.testing.assert_close(torch.cat(steps, dim=1), naive, atol=1e-12, rtol=1e-12)


def route_by_loop(scores, bias, n_group, topk_group, top_k):
    """One token: the experts by the words of the paper, with no tensor operation."""
    size = len(scores) // n_group
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    group_scores = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
    open_groups = sorted(range(n_group), key=lambda g: -group_scores[g])[:topk_group]
    allowed = [e for e in range(len(scores)) if e // size in open_groups]
    return set(sorted(allowed, key=lambda e: -biased[e])[:top_k])


@pytest.mark.parametrize("offset", [0.0, -0.6])
def test_router_equals_a_loop(offset):
    arch = architecture(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=6, routed_scaling_factor=2.5)
    torch.manual_seed(1)
    router = Router(arch)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.normal_(offset, 0.3)
    x = torch.randn(200, arch.hidden_size)
    routing = router(x)
    scores = (x.double() @ router.weight.double().T).sigmoid()
    for token in range(len(x)):
        expected = route_by_loop(scores[token].tolist(), router.e_score_correction_bias.tolist(), 4, 2, 6)
        assert set(routing.experts[token].tolist()) == expected
        chosen = scores[token][routing.experts[token]]
        torch.testing.assert_close(routing.weights[token].double(), 2.5 * chosen / chosen.sum(), atol=1e-6, rtol=1e-5)


def test_dispatch_equals_a_loop_over_experts():
    arch = architecture()
    torch.manual_seed(2)
    experts = Experts(arch)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x, weights = torch.randn(30, arch.hidden_size), torch.rand(30, 3)
    chosen = torch.stack([torch.randperm(8)[:3] for _ in range(30)])
    chosen[:, 0] = 5
    chosen[:, 1:] = torch.where(chosen[:, 1:] == 5, 0, chosen[:, 1:])
    dispatch = Dispatch.by_expert(chosen, 8)
    ours = dispatch.gather(experts(dispatch.scatter(x, 8)), weights)
    state = experts.state_dict()
    for token in range(30):
        expected = torch.zeros(arch.hidden_size)
        for k in range(3):
            e = int(chosen[token, k])
            gate, up, down = (state[f"{e}.{part}.weight"] for part in ("gate_proj", "up_proj", "down_proj"))
            expected += weights[token, k] * (down @ (torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])))
        torch.testing.assert_close(ours[token], expected, atol=1e-5, rtol=1e-4)


def test_state_dict_round_trip_has_published_names():
    arch = architecture()
    model = randomised(arch, seed=4)
    state = model.state_dict()
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in state
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in state
    assert "model.layers.3.eh_proj.weight" in state and "model.layers.3.shared_head.norm.weight" in state
    other = Model(arch)
    other.load_state_dict(state)
    tokens = torch.arange(20)[None]
    assert torch.equal(other(tokens), model(tokens))


def test_packed_documents_do_not_see_each_other():
    arch = architecture()
    model = randomised(arch, seed=5)
    a, b = torch.randint(97, (1, 11)), torch.randint(97, (1, 14))
    packed = torch.cat((a, b), dim=1)
    positions = torch.cat((torch.arange(11), torch.arange(14)))[None]
    document = torch.tensor([[0] * 11 + [1] * 14])
    together = model(packed, positions, document_mask(document))
    torch.testing.assert_close(together[:, :11], model(a), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[:, 11:], model(b), atol=1e-5, rtol=1e-4)


def test_balance_loss_equals_the_papers_sums():
    arch = architecture(num_experts_per_tok=2)
    torch.manual_seed(6)
    router = Router(arch)
    torch.nn.init.normal_(router.weight, std=0.5)
    router.e_score_correction_bias.normal_(0, 1.0)
    routing = router(torch.randn(30, arch.hidden_size))
    lengths, expected, start = (10, 20), 0.0, 0
    for length in lengths:
        s = routing.scores[start : start + length]
        for i in range(8):
            f = 8 / (2 * length) * sum(i in s[t].topk(2).indices.tolist() for t in range(length))
            p = sum((s[t, i] / s[t].sum()).item() for t in range(length)) / length
            expected += f * p / len(lengths)
        start += length
    sequence = torch.tensor([0] * 10 + [1] * 20)
    assert sequence_balance_loss(routing, sequence, 2).item() == pytest.approx(expected, rel=1e-5)


def test_mtp_predicts_the_token_after_next_from_the_next():
    arch = architecture()
    model = randomised(arch, seed=7)
    tokens = torch.randint(97, (1, 12))
    positions, mask = torch.arange(12)[None], causal_mask(12)
    logits = model.mtp_logits(model.hidden(tokens), tokens, positions, mask)
    assert logits.shape == (1, 11, 97)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 97
    other = model.mtp_logits(model.hidden(changed), changed, positions, mask)
    assert torch.equal(logits[:, :7], other[:, :7])
    assert not torch.equal(logits[:, 7], other[:, 7])
