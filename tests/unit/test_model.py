"""Parts of the model against loops, and packing."""

from __future__ import annotations

import torch

from isthmus.model.documents import Documents
from isthmus.model.model import Model, causal_mask
from isthmus.model.moe import Dispatch, Experts
from tests.support.against_transformers import randomised
from tests.support.plain import document_mask, mtp_logits
from tests.support.small import architecture


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
    ours = dispatch.gather(experts(dispatch.scatter(x), dispatch.counts), weights)
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
    for mask in (document_mask(document), Documents.of(document, arch.num_attention_heads)):
        together = model(packed, positions, mask)
        torch.testing.assert_close(together[:, :11], model(a), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[:, 11:], model(b), atol=1e-5, rtol=1e-4)


def test_mtp_predicts_the_token_after_next_from_the_next():
    arch = architecture()
    model = randomised(arch, seed=7)
    tokens = torch.randint(97, (1, 12))
    positions, mask = torch.arange(12)[None], causal_mask(12)
    logits = mtp_logits(model, model.hidden(tokens), tokens, positions, mask)
    assert logits.shape == (1, 11, 97)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 97
    other = mtp_logits(model, model.hidden(changed), changed, positions, mask)
    torch.testing.assert_close(logits[:, :7], other[:, :7], atol=1e-5, rtol=1e-5)
    assert (logits[:, 7] - other[:, 7]).abs().max() > 1e-2
