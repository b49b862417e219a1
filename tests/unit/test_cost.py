"""What a format costs, against sums in float64 over sequences that run alone, and how it travels in a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from isthmus.errors import IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.model.model import Model
from isthmus.parity.capture import LIST, GoldenSet, capture
from isthmus.parity.cost import measure_cost
from isthmus.parity.coverage import check_coverage
from isthmus.parity.manifest import add_file, write_manifest
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.verify import verify_bundle
from tests.support.bundles import TinyTokenizer
from tests.support.small import tiny_architecture

ARCHITECTURE = tiny_architecture()
LENGTHS = ((5, 9), (3, 2), (8, 20), (2, 4))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return Model(ARCHITECTURE).initialise(0).state_dict()


@pytest.fixture(scope="module")
def sequences() -> list[GoldenSequence]:
    drawn = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(ARCHITECTURE.vocab_size, (count,), generator=drawn).tolist()

    return [GoldenSequence(tokens(prompt), tokens(rest)) for prompt, rest in LENGTHS]


def built(state: dict[str, torch.Tensor], name: str) -> Model:
    chosen = get_format(name)
    return chosen.build(ARCHITECTURE, chosen.export(state, ARCHITECTURE))


@torch.inference_mode()
def alone(model: Model, one: GoldenSequence) -> torch.Tensor:
    """Logits of the completion tokens of one sequence by itself, float64."""
    row = torch.tensor([[*one.prompt, *one.completion]])
    return model.logits(model.hidden(row))[0, len(one.prompt) - 1 : -1].double()


def test_the_cost_is_that_of_each_sequence_by_itself_and_keeps_their_order(state, sequences):
    trained, emulator = built(state, "fp32"), built(state, "bf16")
    cost, found = measure_cost(trained, emulator, sequences)
    wanted, given = (torch.cat([alone(model, one) for one in sequences]) for model in (trained, emulator))
    tokens = torch.tensor([token for one in sequences for token in one.completion])
    kl = kl_div(given.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    assert cost.kl == pytest.approx(kl.item(), rel=1e-3)
    assert cost.trained_perplexity == pytest.approx(cross_entropy(wanted, tokens).exp().item(), rel=1e-6)
    assert cost.perplexity == pytest.approx(cross_entropy(given, tokens).exp().item(), rel=1e-6)
    assert (cost.tokens, cost.sequences) == (len(tokens), len(sequences))
    for said, logits in zip(found.logprobs, (wanted, given), strict=True):
        assert torch.allclose(said, -cross_entropy(logits, tokens, reduction="none"), atol=1e-5)


def test_fewer_bits_cost_more(state, sequences):
    trained = built(state, "fp32")
    costs = [measure_cost(trained, built(state, name), sequences)[0].kl for name in ("fp32", "bf16", "w8a8")]
    assert costs[0] == 0.0 and costs == sorted(costs) and costs[2] > 3 * costs[1]


@pytest.fixture
def captured(tmp_path, state, sequences) -> Path:
    folder = tmp_path / "bundle"
    write_bundle(folder, "w8a8", state, ARCHITECTURE, TinyTokenizer())
    capture(folder, state, [[*one.prompt, *one.completion] for one in sequences])
    write_manifest(folder, coverage=check_coverage(state, folder)[0], architecture=ARCHITECTURE)
    return folder


def test_a_captured_bundle_says_what_its_format_costs_and_what_both_models_said(captured, state):
    golden = GoldenSet(captured)
    halves = golden.listed.golden_sequences()
    cost, found = measure_cost(built(state, "fp32"), read_bundle(captured).build(), halves)
    assert golden.listed.cost == cost
    said = golden.token_logprobs()
    assert torch.equal(torch.stack((said.trained, said.emulator)), found.logprobs)


def test_a_bundle_that_does_not_say_it_is_not_verified(captured):
    listed = json.loads((captured / LIST).read_bytes())
    add_file(captured, LIST, json.dumps(listed | {"cost": None}).encode())
    for ask in (lambda: verify_bundle(captured), GoldenSet(captured).token_logprobs):
        with pytest.raises(IsthmusError, match="isthmus capture"):
            ask()
