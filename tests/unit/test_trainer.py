"""Packing, losses, the optimiser and the off-policy correction."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from isthmus.data.corpus import Document
from isthmus.errors import IsthmusError
from isthmus.model.model import Model
from isthmus.recipe.steps import LossSection, OptimizerSection, SftSection
from isthmus.trainer import step as step_module
from isthmus.trainer.batch import pack
from isthmus.trainer.correction import importance_weights, mismatch, off_policy_samples
from isthmus.trainer.optimizer import Muon, Optimizer, is_hidden_matrix, orthogonalise
from isthmus.trainer.parts import Part, parts_of
from isthmus.trainer.step import accumulate_gradients, target_logprobs, train_step, update_router_bias
from tests.support.against_transformers import randomised
from tests.support.plain import mtp_logits
from tests.support.small import architecture

OBJECTIVE = SftSection(
    name="taught",
    kind="sft",
    steps=1,
    optimizer=OptimizerSection(name="adamw", learning_rate=1e-3),
    balance_alpha=0.01,
    bias_update_speed=0.01,
)
MUON = OptimizerSection(name="muon", learning_rate=1e-2, matrix_learning_rate=2e-2, warmup_steps=2)


def documents(seed: int, lengths: list[int]) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    return [Document(torch.randint(97, (n,), generator=generator).tolist(), max(1, n // 3)) for n in lengths]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(0, 1000))
def test_packing_keeps_every_document_whole_and_once(lengths, seed):
    items = documents(seed, lengths)
    batch = pack(items, 48)
    assert batch.num_tokens == sum(lengths)
    assert batch.target_mask.sum() == sum(len(d.tokens) - d.prompt_length for d in items)
    for index, item in enumerate(items):
        here = batch.document == index
        assert batch.tokens[here].tolist() == item.tokens
        assert batch.positions[here].tolist() == list(range(len(item.tokens)))
        assert batch.target_mask[here].sum() == len(item.tokens) - item.prompt_length


@given(st.lists(st.integers(2, 40), min_size=8, max_size=60), st.integers(1, 4))
def test_rows_are_about_as_long_as_asked_and_divide_among_ranks(lengths, ranks):
    batch = pack(documents(0, lengths), 60, multiple_of=ranks)
    rows, width = batch.tokens.shape
    assert rows % ranks == 0
    assert width * rows < sum(lengths) + max(lengths) * rows, "the fullest row is within one document of the mean"
    if sum(lengths) >= 60 * ranks:
        assert sum(lengths) / rows >= 60


def test_losses_of_packed_documents_equal_those_of_single_ones():
    model = randomised(architecture(), seed=1)
    items = documents(1, [9, 20, 14, 30, 6])
    batch = pack(items, 48)
    together = accumulate_gradients(model, Optimizer(model, MUON, 1), batch, OBJECTIVE)
    total, count, mtp_total, mtp_count = 0.0, 0, 0.0, 0
    for item in items:
        tokens = torch.tensor([item.tokens])
        length, start = len(item.tokens), item.prompt_length
        logits = model(tokens)[0]
        total += F.cross_entropy(logits[start - 1 : -1], tokens[0, start:], reduction="sum").item()
        count += length - start
        mask = torch.full((length, length), -math.inf).triu(1)[None, None]
        mtp = mtp_logits(model, model.hidden(tokens), tokens, torch.arange(length)[None], mask)[0]
        for target in range(max(start, 2), length):
            mtp_total += F.cross_entropy(mtp[target - 2], tokens[0, target]).item()
            mtp_count += 1
    assert together.loss == pytest.approx(total / count, rel=1e-5)
    assert together.mtp_loss == pytest.approx(mtp_total / mtp_count, rel=1e-5)


@pytest.mark.parametrize("logits_at_once", [1 << 25, 97 * 4])
def test_microbatches_and_parts_of_the_logits_change_nothing(monkeypatch, logits_at_once):
    model = randomised(architecture(), seed=1)
    optimizer = Optimizer(model, MUON, 1)
    batch = pack(documents(1, [9, 20, 14, 30, 6, 25, 17]), 30)
    whole = accumulate_gradients(model, optimizer, batch, OBJECTIVE)
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    monkeypatch.setattr(step_module, "LOGITS_AT_ONCE", logits_at_once)
    parts = accumulate_gradients(model, optimizer, batch, OBJECTIVE, rows_at_once=3)
    assert len(batch.tokens) % 3 == 1
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.mtp_loss == pytest.approx(whole.mtp_loss, rel=1e-6)
    assert parts.balance_loss == pytest.approx(whole.balance_loss, rel=1e-6)
    assert [load.tolist() for load in parts.loads] == [load.tolist() for load in whole.loads]
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_without_multi_token_prediction_its_router_stays():
    model = randomised(architecture(), seed=1)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    objective = OBJECTIVE.model_copy(update={"mtp_weight": 0.0})
    losses, _ = train_step(model, Optimizer(model, MUON, 1), pack(documents(1, [9, 20, 14])), objective, 0)
    after = [router.e_score_correction_bias for router in model.routers()]
    assert losses.mtp_loss == 0.0 and len(losses.loads) == len(before) - 1
    assert torch.equal(before[-1], after[-1]) and not torch.equal(before[0], after[0])


def test_recomputed_activations_give_the_same_gradients():
    model = randomised(architecture(), seed=1)
    optimizer = Optimizer(model, MUON, 1)
    batch = pack(documents(1, [9, 20, 14]), 30)
    accumulate_gradients(model, optimizer, batch, OBJECTIVE)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.recompute_activations()
    accumulate_gradients(model, optimizer, batch, OBJECTIVE)
    for gradient, again in zip(expected, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert torch.equal(gradient, again)


def test_target_logprobs_are_those_of_the_sampled_distribution():
    model = randomised(architecture(), seed=2)
    items = documents(2, [9, 20])
    batch = pack(items, 48)
    logprobs, entropy = target_logprobs(model, batch, temperature=0.7)
    sample = batch.document[batch.target_mask]
    for index, item in enumerate(items):
        expected = F.log_softmax(model(torch.tensor([item.tokens]))[0] / 0.7, dim=-1)[item.prompt_length - 1 : -1]
        taken = expected[range(len(expected)), item.tokens[item.prompt_length :]]
        torch.testing.assert_close(logprobs[sample == index], taken, atol=1e-5, rtol=1e-4)
        own = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(entropy[sample == index], own.detach(), atol=1e-5, rtol=1e-4)


def test_router_bias_moves_towards_the_idle_experts():
    model = randomised(architecture(), seed=3)
    router = model.routers()[0]
    before = router.e_score_correction_bias.clone()
    load = torch.tensor([9.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    update_router_bias([router], [load], speed=0.01)
    expected = torch.tensor([-0.01, 0.01] + [0.0] * 6)
    torch.testing.assert_close(router.e_score_correction_bias - before, expected)


def test_newton_schulz_pushes_singular_values_to_one():
    torch.manual_seed(4)
    for shape in ((3, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_equals_torchs_on_a_single_matrix():
    torch.manual_seed(5)
    for shape in ((12, 20), (20, 12)):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape) * 0.1) for _ in range(2))
        muon = Muon([(Part("w", ours, None), ours.detach())])
        reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
        for _ in range(3):
            gradient = torch.randn(shape)
            muon.locals[0].grad, theirs.grad = gradient.clone(), gradient.clone()
            muon.step(0.02, 0.1)
            reference.step()
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_which_parameters_muon_takes():
    model = Model(architecture())
    taken = {part.name for part in parts_of(model) if is_hidden_matrix(part)}
    assert "model.layers.1.mlp.experts.gate_up" in taken and "model.layers.0.self_attn.o_proj.weight" in taken
    assert not any("embed" in name or "lm_head" in name or "mlp.gate." in name or "norm" in name for name in taken)


def test_schedules():
    def factors(**settings):
        section = OptimizerSection(name="adamw", learning_rate=1.0, **settings)
        optimizer = Optimizer(torch.nn.Linear(2, 2), section, 100)
        return [optimizer.schedule(step) for step in (0, 4, 50, 80, 90, 99)]

    assert factors(warmup_steps=10) == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert factors(decay_share=0.2) == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.5, 0.05])
    assert factors(decay_share=0.2, final_rate=0.1) == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.55, 0.145])
    cosine = factors(decay_share=0.2, decay="cosine", final_rate=0.1)
    assert cosine == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.55, 0.1 + 0.45 * (1 - math.cos(math.pi * 0.05))])


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = randomised(architecture(), seed=6)
    optimizer = Optimizer(model, MUON, 4)
    batch = pack(documents(0, [20, 30]), 48)
    accumulate_gradients(model, optimizer, batch, OBJECTIVE)
    before = {name: tensor.clone() for name, tensor in {**model.state_dict(), **optimizer.state()}.items()}
    model.model.norm.weight.grad = torch.full_like(model.model.norm.weight, math.nan)
    with pytest.raises(IsthmusError, match=r"nan at step 2.*diverged"):
        optimizer.step(2)
    after = {**model.state_dict(), **optimizer.state()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_equal_those_of_torchs_optimisers():
    model = randomised(architecture(num_nextn_predict_layers=0), seed=6)
    section = OptimizerSection(name="adamw", learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.9), gradient_clip=0.5)
    objective = OBJECTIVE.model_copy(update={"optimizer": section, "bias_update_speed": 0.0})
    reference = copy.deepcopy(model)
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    optimizer = Optimizer(model, section, 3)
    helper = Optimizer(reference, section, 3)
    for step in range(3):
        batch = pack(documents(step, [20, 30, 12]), 48)
        _, norm = train_step(model, optimizer, batch, objective, step)
        accumulate_gradients(reference, helper, batch, objective)
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        adamw.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_mismatch_and_importance_weights_on_a_written_out_example():
    engine = torch.tensor([0.5, 0.25, 0.1]).log()
    trainer = torch.tensor([0.25, 0.25, 0.4]).log()
    gap = mismatch(trainer, engine)
    assert gap.mean_abs == pytest.approx((math.log(2) + 0 + math.log(4)) / 3, rel=1e-6)
    k3 = [(0.5 - 1 - math.log(0.5)), 0.0, (4 - 1 - math.log(4))]
    assert gap.k3 == pytest.approx(sum(k3) / 3, rel=1e-6)
    for options, weights, clipped in (
        ({}, [0.5, 1.0, 2.0], 1),
        ({"importance_cap": 5.0}, [0.5, 1.0, 4.0], 0),
        ({"importance": "mask", "importance_floor": 0.6, "importance_cap": 3.0}, [0.0, 1.0, 0.0], 2),
        ({"importance": "none"}, [1.0, 1.0, 1.0], 0),
    ):
        correction = importance_weights(trainer, engine, LossSection(**options))
        torch.testing.assert_close(correction.weights, torch.tensor(weights))
        assert correction.clipped == clipped and correction.total == pytest.approx(0.5 + 1 + 4, rel=1e-6)


def test_a_bad_sample_that_the_policy_has_left_is_masked():
    """Means of log(engine / trainer) by sample: 0.3, 0.3, 0.1, -0.3; the first is good, and stays."""
    sample = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    gap = torch.tensor([0.1, 0.5, 0.6, 0.0, 0.3, -0.1, -0.3])
    trainer = torch.full((7,), -2.0)
    masked = off_policy_samples(trainer, trainer + gap, advantages, sample, limit=0.2)
    assert masked.tolist() == [False, False, True, True, False, False, False]
    assert off_policy_samples(*[torch.zeros(0)] * 3, torch.zeros(0, dtype=torch.long), 0.2).tolist() == []


def test_k3_estimates_the_kl_divergence():
    torch.manual_seed(7)
    p, q = torch.rand(20).softmax(0), torch.rand(20).softmax(0)
    drawn = torch.multinomial(p, 200_000, replacement=True)
    exact = (p * (p / q).log()).sum().item()
    assert mismatch(q.log()[drawn], p.log()[drawn]).k3 == pytest.approx(exact, rel=0.05)
