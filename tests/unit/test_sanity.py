"""Whether the source's own model makes sense of the golden prompts: a model that was taught them, and damaged ones."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from isthmus.errors import GateRefused
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.model import Model
from isthmus.parity.capture import CaptureOptions, GoldenSet, capture, synthetic_prompts
from isthmus.parity.coverage import check_coverage
from isthmus.parity.manifest import write_manifest
from isthmus.parity.sanity import NAME, check_sanity, unigram_logprobs
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.verify import Limits, verify_bundle
from isthmus.progress import Watch
from isthmus.tools.capture import execute
from tests.support.bundles import TinyTokenizer, published, taught
from tests.support.small_dense import dense_architecture

SMALL = dense_architecture("llama", vocab_size=300)
ROWS = [[10 + (start * step + place) % 40 for place in range(24)] for start in range(4) for step in (1, 7, 9)]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Of a model that counts."""
    return dict(taught(Model(SMALL).initialise(0), ROWS, steps=40).state_dict())


def judged(folder: Path, state: State, rows: list[list[int]] = ROWS, *, synthetic: bool = False):
    write_bundle(folder, "fp32", state, SMALL, TinyTokenizer())
    capture(folder, state, rows, CaptureOptions(synthetic=synthetic))
    return check_sanity(GoldenSet(folder), SMALL.vocab_size)


def garbled(state: State) -> State:
    """As if the exponents of some scales had been taken for the scales themselves."""
    return {name: tensor * (120.0 if "layers.1" in name else 1.0) for name, tensor in state.items()}


def test_a_model_that_knows_its_text_passes_and_says_by_how_much(tmp_path: Path, state: State):
    found = judged(tmp_path / "b", state)
    assert found.outcome == "pass" and found.layer == "source"
    assert found.figure is not None and found.figure.low is not None and found.figure.low > 1.0


def test_a_model_of_garbled_weights_is_refused_though_its_bundle_is_faithful(tmp_path: Path, state: State):
    head = {"lm_head.weight": state["lm_head.weight"].roll(7, 0)}
    for number, damaged in enumerate((garbled(state), state | head)):
        found = judged(tmp_path / f"b{number}", damaged)
        assert found.outcome == "fail" and "frequencies" in found.detail
    entries, _ = check_coverage(state | head, tmp_path / "b1")
    write_manifest(tmp_path / "b1", coverage=entries, architecture=SMALL)
    verdict = verify_bundle(tmp_path / "b1", limits=Limits())
    assert verdict.verdict == "refuse"
    assert [check.name for check in verdict.checks if check.outcome == "fail"] == [NAME], "all else is faithful"


def test_capture_refuses_a_source_that_makes_no_sense_of_the_prompts(tmp_path: Path, state: State):
    damaged = Model(SMALL)
    damaged.load_state_dict(state | {"lm_head.weight": state["lm_head.weight"].roll(7, 0)})
    published(tmp_path / "c", damaged, torch.float32)
    write_bundle(tmp_path / "b", "fp32", damaged.state_dict(), SMALL, TinyTokenizer())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"tokens": {row}}}\n' for row in ROWS))
    with pytest.raises(GateRefused, match="the source's own model makes sense of the golden prompts"):
        execute(tmp_path / "b", tmp_path / "c", prompts, False, 256, Watch(quiet=True))


def test_a_model_that_knows_nothing_apart_is_refused(tmp_path: Path, state: State):
    silent = state | {"lm_head.weight": torch.zeros_like(state["lm_head.weight"])}
    assert "equally likely" in judged(tmp_path / "b", silent, synthetic=True).detail
    nothing = state | {"model.norm.weight": torch.full_like(state["model.norm.weight"], math.nan)}
    found = judged(tmp_path / "n", nothing)
    assert found.outcome == "fail" and "no number" in found.detail


def test_random_tokens_tell_nothing_more_of_a_model_without_training(tmp_path: Path):
    untrained = dict(Model(SMALL).initialise(3).state_dict())
    for number, synthetic in enumerate((True, False)):
        rows = synthetic_prompts(SMALL.vocab_size, 8, 24)
        assert judged(tmp_path / f"b{number}", untrained, rows, synthetic=synthetic).outcome == "pass"


def test_a_unigram_is_that_of_the_rest_of_the_text():
    """Against a count over each text without the token, with Witten and Bell's weight of a uniform guess."""
    sequences = [GoldenSequence([1, 2, 2], [3, 2]), GoldenSequence([4], [1, 1, 5])]
    text = [1, 2, 2, 3, 2, 4, 1, 1, 5]
    expected = []
    for place in (3, 4, 6, 7, 8):
        rest = Counter(text[:place] + text[place + 1 :])
        expected.append(math.log((rest[text[place]] + 5 / 10) / (8 + 5)))
    assert unigram_logprobs(sequences, 10).tolist() == pytest.approx(expected)
