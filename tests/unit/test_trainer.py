"""Packing, losses, the optimiser, checkpoints and the off-policy correction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import architecture
from test_model import randomised
from torch.nn import functional as F

from isthmus.data.corpus import Document
from isthmus.errors import DamagedFile
from isthmus.model.model import Model
from isthmus.recipe import OptimizerSection
from isthmus.trainer.batch import pack
from isthmus.trainer.checkpoint import load_checkpoint, load_latest, save_checkpoint
from isthmus.trainer.correction import mismatch, slope, truncated_importance
from isthmus.trainer.optimizer import Muon, Optimizer, is_hidden_matrix, orthogonalise
from isthmus.trainer.step import sft_losses, target_logprobs, update_router_bias

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


def test_packing_refuses_a_document_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        pack(documents(0, [50]), 48)


def test_losses_of_packed_documents_equal_those_of_single_ones():
    model = randomised(architecture(), seed=1)
    items = documents(1, [9, 20, 14, 30, 6])
    batch = pack(items, 48)
    together = sft_losses(model, batch, mtp_weight=0.3, balance_alpha=0.0)
    total, count, mtp_total, mtp_count = 0.0, 0, 0.0, 0
    for item in items:
        tokens = torch.tensor([item.tokens])
        length, start = len(item.tokens), item.prompt_length
        logits = model(tokens)[0]
        total += F.cross_entropy(logits[start - 1 : -1], tokens[0, start:], reduction="sum").item()
        count += length - start
        mask = torch.full((length, length), -math.inf).triu(1)[None, None]
        mtp = model.mtp_logits(model.hidden(tokens), tokens, torch.arange(length)[None], mask)[0]
        for target in range(max(start, 2), length):
            mtp_total += F.cross_entropy(mtp[target - 2], tokens[0, target]).item()
            mtp_count += 1
    assert together.loss == pytest.approx(total / count, rel=1e-5)
    assert together.mtp_loss == pytest.approx(mtp_total / mtp_count, rel=1e-5)
    assert together.total.item() == pytest.approx(together.loss + 0.3 * together.mtp_loss, rel=1e-6)


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
        muon = Muon({"w": ours})
        reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
        for _ in range(3):
            gradient = torch.randn(shape)
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            muon.step(0.02, 0.1)
            reference.step()
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_which_parameters_muon_takes():
    model = Model(architecture())
    taken = {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    assert "model.layers.1.mlp.experts.gate_up" in taken and "model.layers.0.self_attn.o_proj.weight" in taken
    assert not any("embed" in name or "lm_head" in name or "mlp.gate." in name or "norm" in name for name in taken)


def train(model: Model, optimizer: Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        losses = sft_losses(model, pack(documents(step, [20, 30, 12]), 48), mtp_weight=0.3, balance_alpha=1e-3)
        losses.total.backward()
        optimizer.step(step)
        update_router_bias(model.routers(), losses.loads, 1e-2)


def test_resume_from_a_checkpoint_is_bitwise(tmp_path):
    straight = randomised(architecture(), seed=6)
    train(straight, Optimizer(straight, MUON, 8), 0, 8)
    first = randomised(architecture(), seed=6)
    optimizer = Optimizer(first, MUON, 8)
    train(first, optimizer, 0, 4)
    save_checkpoint(tmp_path, 4, first.state_dict(), optimizer.state(), keep=2)
    second = Model(architecture())
    checkpoint = load_latest(tmp_path)
    second.load_state_dict(checkpoint.model)
    resumed = Optimizer(second, MUON, 8)
    resumed.load_state(checkpoint.optimizer)
    train(second, resumed, checkpoint.step, 8)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_checkpoints_are_kept_to_a_number_and_leftovers_removed(tmp_path):
    (tmp_path / ".step-000001.99.tmp").mkdir()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.ones(3) * step}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    assert load_latest(tmp_path).model["w"].tolist() == [3, 3, 3]


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def drop_tensor(path):
    tensors = load_file(path)
    tensors.pop("w")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_bit, "'w' does not match its hash"),
        (drop_tensor, "disagree about the tensor 'w'"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_says_how_to_go_on(tmp_path, damage, message):
    save_checkpoint(tmp_path, 1, {"w": torch.randn(50), "a": torch.zeros(2)}, {}, keep=2)
    folder, _ = save_checkpoint(tmp_path, 2, {"w": torch.randn(50), "a": torch.zeros(2)}, {}, keep=2)
    damage(folder / "model.safetensors")
    with pytest.raises(DamagedFile, match=message) as caught:
        load_latest(tmp_path)
    assert "step-000002" in str(caught.value) and "continue from step-000001" in str(caught.value)


def test_a_checkpoint_that_was_swapped_for_another_is_noticed(tmp_path):
    folder, sha256 = save_checkpoint(tmp_path, 1, {"w": torch.zeros(3)}, {}, keep=1)
    load_checkpoint(folder, sha256)
    save_checkpoint(tmp_path, 1, {"w": torch.ones(3)}, {}, keep=1)
    with pytest.raises(DamagedFile, match="not the one that was recorded"):
        load_checkpoint(folder, sha256)


def test_mismatch_and_truncated_importance_on_a_written_out_example():
    engine = torch.tensor([0.5, 0.25, 0.1]).log()
    trainer = torch.tensor([0.25, 0.25, 0.4]).log()
    gap = mismatch(trainer, engine)
    assert gap.mean_abs == pytest.approx((math.log(2) + 0 + math.log(4)) / 3, rel=1e-6)
    k3 = [(0.5 - 1 - math.log(0.5)), 0.0, (4 - 1 - math.log(4))]
    assert gap.k3 == pytest.approx(sum(k3) / 3, rel=1e-6)
    correction = truncated_importance(trainer, engine, cap=2.0)
    torch.testing.assert_close(correction.weights, torch.tensor([0.5, 1.0, 2.0]))
    assert correction.clipped == pytest.approx(1 / 3)
    assert correction.mean == pytest.approx((0.5 + 1 + 4) / 3, rel=1e-6)


def test_k3_estimates_the_kl_divergence():
    torch.manual_seed(7)
    p, q = torch.rand(20).softmax(0), torch.rand(20).softmax(0)
    drawn = torch.multinomial(p, 200_000, replacement=True)
    exact = (p * (p / q).log()).sum().item()
    assert mismatch(q.log()[drawn], p.log()[drawn]).k3 == pytest.approx(exact, rel=0.05)


def test_slope():
    assert slope([1.0, 2.0]) is None
    assert slope([1.0, 3.0, 5.0, 7.0]) == pytest.approx(2.0)
