"""Worlds of several ranks against one process on the same data: losses, loads, router biases, gradients, tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from isthmus.data.corpus import Document
from isthmus.errors import IsthmusError
from isthmus.formats.files.published import CONFIG, WEIGHTS
from isthmus.formats.parts.assemble import unfilled
from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.model.moe import Experts
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.schema import TrainSection
from isthmus.recipe.steps import OptimizerSection, SftSection
from isthmus.trainer.batch import Batch, pack
from isthmus.trainer.compiled import compile_parts
from isthmus.trainer.mesh import Ranks, alone, check_layout
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute, materialise
from isthmus.trainer.parts import initialise, load_published, model_state
from isthmus.trainer.step import train_step
from tests.support.small import tiny_architecture
from tests.support.small_dense import FAMILIES, dense_architecture
from tests.support.worlds import in_world

STEPS = 50
TINY_MODEL = tiny_architecture()
TIED = {
    "mixture": tiny_architecture(tie_word_embeddings=True),
    "dense": dense_architecture(tie_word_embeddings=True, vocab_size=61),
}
ADAMW = OptimizerSection(name="adamw", learning_rate=2e-3, warmup_steps=5)
MUON = OptimizerSection(name="muon", learning_rate=2e-3, matrix_learning_rate=5e-3, warmup_steps=5)


@dataclass
class Seen:
    """What training showed on one rank; `losses` are (loss, MTP loss, balance loss). `held`: the numbers it holds."""

    losses: list[tuple[float, float, float]]
    loads: list[list[list[float]]]
    norms: list[float]
    biases: list[list[float]]
    held: int
    names: set[str]


def batch_of_step(step: int, rank: int, world: int) -> Batch:
    """Every world-th row of seven documents of changing lengths: rows divide unevenly, and a rank may have none."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(6, 40, (7,), generator=generator).tolist()
    documents = [Document(torch.randint(61, (n,), generator=generator).tolist(), max(1, n // 3)) for n in lengths]
    rows = pack(documents, 40)
    return rows.select(range(rank, len(rows.tokens), world))


def train(
    ranks: Ranks,
    options: dict[str, Any],
    optimizer: OptimizerSection = ADAMW,
    steps: int = STEPS,
    architecture: ModelSection = TINY_MODEL,
) -> Seen:
    section = TrainSection(**options)
    sft = SftSection(
        name="taught", kind="sft", steps=steps, optimizer=optimizer, balance_alpha=0.01, bias_update_speed=0.01
    )
    model = unfilled(architecture)
    if section.activation_checkpointing:
        model.recompute_activations()
    if ranks.grouped:
        distribute(model, ranks, section, torch.bfloat16 if section.precision == "bf16" else torch.float32)
    materialise(model, ranks.device)
    initialise(model, 0)
    updates = Optimizer(model, sft.optimizer, steps, ranks, section.replicate)
    losses, loads, norms = [], [], []
    for step in range(steps):
        batch = batch_of_step(step, ranks.rank, ranks.world)
        found, norm = train_step(model, updates, batch, sft, step, ranks, section.rows_per_microbatch)
        losses.append((found.loss, found.mtp_loss, found.balance_loss))
        loads.append([load.tolist() for load in found.loads])
        norms.append(norm)
    biases = [bias.tolist() for router in model.routers() if (bias := router.e_score_correction_bias) is not None]
    held = sum(part.numel() for part in {**model_state(model)}.values() if not hasattr(part, "to_local"))
    held += sum(part.to_local().numel() for part in model_state(model).values() if hasattr(part, "to_local"))
    return Seen(losses, loads, norms, biases, held, set(model_state(model)))


def train_in_group(rank: int, *arguments: Any) -> Seen:
    return train(Ranks(rank, dist.get_world_size(), torch.device("cpu"), grouped=True), *arguments)


@pytest.fixture(scope="module")
def single() -> Seen:
    torch.set_num_threads(1)
    return train(alone(torch.device("cpu")), {})


def assert_same_training(found: Seen, expected: Seen, tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)
    assert found.loads == expected.loads
    assert found.norms == pytest.approx(expected.norms, abs=2 * tolerance)
    assert found.biases == expected.biases


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(2, {"expert": 2}, marks=pytest.mark.long),
        pytest.param(4, {"rows_per_microbatch": 1}, marks=pytest.mark.long),
        (4, {"expert": 2, "activation_checkpointing": True}),
        pytest.param(4, {"replicate": 2, "expert": 2}, marks=pytest.mark.long),
    ],
    ids=["experts", "sharded", "sharded-experts", "replicated"],
)
def test_the_curve_of_several_ranks_is_that_of_one(single, world, options):
    everyone = in_world(world, train_in_group, options)
    for seen in everyone:
        assert_same_training(seen, single)
    share = world // options.get("replicate", 1)
    whole = single.held - sum(map(len, single.biases))
    for seen in everyone:
        assert seen.held - sum(map(len, seen.biases)) < 1.1 * whole / share
    assert set.union(*(seen.names for seen in everyone)) == single.names


@pytest.mark.parametrize("name", ["qwen3", "mistral", "qwen3_moe", "qwen3_moe with a dense layer"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_every_family_trains_on_two_ranks_as_on_one(name: str, precision: str):
    """Norms of heads, windows, and experts without a balancing bias, which are spread over the ranks."""
    family = FAMILIES[name]
    options = {"precision": precision, **({"expert": 2} if family.sparse_layers else {})}
    expected = train(alone(torch.device("cpu")), {}, ADAMW, 6, family)
    assert expected.biases == [] and len(expected.loads[0]) == len(family.sparse_layers)
    for seen in in_world(2, train_in_group, options, ADAMW, 6, family):
        if precision == "fp32":
            assert_same_training(seen, expected)
        else:
            assert [one[0] for one in seen.losses] == pytest.approx([one[0] for one in expected.losses], rel=0.01)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_stays_tied_over_ranks(name):
    architecture = TIED[name]
    expected = train(alone(torch.device("cpu")), {}, ADAMW, 4, architecture)
    for found in in_world(2, train_in_group, {}, ADAMW, 4, architecture):
        assert_same_training(found, expected)


@pytest.mark.parametrize("architecture", [TINY_MODEL, *TIED.values()], ids=["plain", *TIED])
def test_shards_are_initialised_and_loaded_as_the_whole(tmp_path, architecture):
    whole = Model(architecture).initialise(3).state_dict()
    names = in_world(2, compare_with_whole, architecture, tmp_path)
    assert set.union(*names) == set(whole)


def compare_with_whole(rank: int, architecture: ModelSection, folder: Path) -> set[str]:
    """Raises AssertionError unless what this rank holds, initialised or read from a file, is that of a whole model."""
    whole = Model(architecture).initialise(3)
    ranks = Ranks(rank, 2, torch.device("cpu"), grouped=True)
    if rank == 0:
        save_file({name: tensor.clone() for name, tensor in whole.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(
            json.dumps(hf_config(architecture, dtype="float32", bos_token_id=0, eos_token_id=1))
        )
    dist.barrier()
    for fill in (lambda model: initialise(model, 3), lambda model: load_published(model, folder)):
        model = unfilled(architecture)
        experts = 2 if architecture.model_type == "deepseek_v3" else 1
        distribute(model, ranks, TrainSection(expert=experts), torch.float32)
        materialise(model, ranks.device)
        fill(model)
        state = model_state(model)
        for name, tensor in state.items():
            found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(found, whole.state_dict()[name]), name
    return set(state)


def test_muon_gathers_the_matrices_of_which_ranks_hold_rows():
    expected = train(alone(torch.device("cpu")), {}, MUON, 12)
    (found, _) = in_world(2, train_in_group, {"expert": 2}, MUON, 12)
    assert_same_training(found, expected, tolerance=1e-4)


def test_bf16_computes_coarsely_and_keeps_fp32_weights(single):
    (found,) = in_world(1, train_in_group, {"precision": "bf16"}, ADAMW, 6)
    for ours, theirs in zip(found.losses, single.losses, strict=False):
        assert ours != theirs
        assert ours == pytest.approx(theirs, rel=0.02)
    dtypes = in_world(1, kept_dtypes)[0]
    assert dtypes == {torch.float32}


def kept_dtypes(rank: int) -> set[torch.dtype]:
    model = Model(tiny_architecture())
    distribute(model, Ranks(rank, 1, torch.device("cpu"), grouped=True), TrainSection(), torch.bfloat16)
    return {tensor.dtype for tensor in model_state(model).values()}


def exchanged(rank: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    """Rows through experts that two ranks hold; with the gradient of the rows, and the shapes that were sent."""
    sent = []
    model = Model(tiny_architecture()).initialise(0)
    distribute(model, Ranks(rank, 2, torch.device("cpu"), grouped=True), TrainSection(expert=2), torch.float32)
    moe = model.model.layers[1].mlp
    swap = moe.exchange.swap

    def watched(arrived, rows, *shares):
        if rows.dim() == 2:
            sent.append(tuple(rows.shape))
        swap(arrived, rows, *shares)

    moe.exchange.swap = watched
    rows, counts = uneven_rows(rank)
    result = moe.exchange(moe.experts, rows.requires_grad_(), counts)
    result.square().sum().backward()
    return result.detach().numpy(), rows.grad.numpy(), sent


def uneven_rows(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0 sends to all experts but one, rank 1 to a single expert."""
    counts = torch.tensor([[3, 0, 4, 1], [0, 0, 0, 5]][rank])
    return torch.randn(int(counts.sum()), 32, generator=torch.Generator().manual_seed(rank)), counts


def test_tokens_travel_to_their_experts_and_back():
    whole: Experts = Model(tiny_architecture()).initialise(0).model.layers[1].mlp.experts
    for rank, (result, gradient, sent) in enumerate(in_world(2, exchanged)):
        rows, counts = uneven_rows(rank)
        expected = whole(rows.requires_grad_(), counts)
        expected.square().sum().backward()
        torch.testing.assert_close(torch.tensor(result), expected.detach())
        torch.testing.assert_close(torch.tensor(gradient), rows.grad)
        assert all(shape[1] == 32 for shape in sent)
        assert len(sent) == 4


@pytest.mark.long
def test_compiled_parts_compute_the_same(single):
    found = in_world(1, compiled_losses)[0]
    assert found == pytest.approx([losses[0] for losses in single.losses[: len(found)]], abs=1e-5)


def compiled_losses(rank: int) -> list[float]:
    """Losses of steps with different numbers of tokens; a part that is compiled for each of them would raise."""
    model = Model(TINY_MODEL).initialise(0)
    compile_parts(model)
    sft = SftSection(
        name="taught", kind="sft", steps=STEPS, optimizer=ADAMW, balance_alpha=0.01, bias_update_speed=0.01
    )
    optimizer = Optimizer(model, ADAMW, STEPS)
    return [train_step(model, optimizer, batch_of_step(step, 0, 1), sft, step)[0].loss for step in range(10)]


def test_layouts_that_do_not_divide_are_refused():
    check_layout(tiny_architecture(), TrainSection(replicate=2, expert=2), 8)
    with pytest.raises(IsthmusError, match="training on 6 ranks with"):
        check_layout(tiny_architecture(), TrainSection(replicate=2, expert=2), 6)
    with pytest.raises(IsthmusError, match="8 does not divide the 4 routed experts"):
        check_layout(tiny_architecture(), TrainSection(expert=8), 8)
    with pytest.raises(IsthmusError, match="8 ranks share the 4 routed experts"):
        check_layout(tiny_architecture(), TrainSection(), 8)
    with pytest.raises(IsthmusError, match="a dense model has no experts"):
        check_layout(TIED["dense"], TrainSection(expert=2), 2)
