"""Capture and verification piece by piece: what is kept, how large it is, and that nothing but the pieces is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.formats.files.bundle import Bundle, open_bundle, read_bundle, write_bundle
from isthmus.formats.parts import pieces
from isthmus.model.model import Model
from isthmus.parity import capture as capturing
from isthmus.parity import verify as verifying
from isthmus.parity.capture import CaptureOptions, GoldenSet, capture, synthetic_prompts
from isthmus.parity.coverage import check_coverage
from isthmus.parity.manifest import write_manifest
from isthmus.parity.target import stream_target
from isthmus.parity.verify import Target, verify_bundle
from isthmus.records import ParityVerdict
from tests.support.bundles import TinyTokenizer
from tests.support.small import architecture

SMALL = architecture(hidden_size=64, q_lora_rank=32, swiglu_limit=2.0, initializer_range=0.1)
PROMPTS = synthetic_prompts(SMALL.vocab_size, 4, 24)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    state = Model(SMALL).initialise(3).state_dict()
    write_bundle(tmp_path / "bundle", "w8a8", state, SMALL, TinyTokenizer())
    return tmp_path / "bundle"


def captured(folder: Path, options: CaptureOptions | None = None) -> GoldenSet:
    state = Model(SMALL).initialise(3).state_dict()
    entries, _ = check_coverage(state, folder)
    capture(folder, state, PROMPTS, options)
    write_manifest(folder, coverage=entries, architecture=SMALL)
    return GoldenSet(folder)


def replayed(verdict: ParityVerdict) -> list[tuple[str, str]]:
    return [(check.name, check.outcome) for check in verdict.checks if check.layer in ("files", "modules")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_experts_that_come_one_by_one_are_captured_and_verified_like_a_whole_layer(
    bundle: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = captured(bundle)
    kept = {path: whole.block(path) for path in whole.listed.blocks}
    expected = verify_bundle(bundle, target=Target(dtype=dtype))
    monkeypatch.setattr(pieces, "WHOLE_EXPERTS", 0)
    found = verify_bundle(bundle, target=Target(dtype=dtype))
    assert replayed(found) == replayed(expected) and all(outcome == "pass" for _, outcome in replayed(found))
    assert [row.module for row in found.ledger] == [row.module for row in expected.ledger]
    again = captured(bundle)
    for path, block in kept.items():
        torch.testing.assert_close(again.block(path).output, block.output, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("lent", [False, True])
def test_a_fault_in_an_expert_of_a_target_is_named(bundle: Path, lent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's loader gets one expert's scales wrong."""
    captured(bundle)
    monkeypatch.setattr(pieces, "WHOLE_EXPERTS", 0 if lent else pieces.WHOLE_EXPERTS)
    name = "model.layers.2.mlp.experts.5.down_proj.weight_scale"

    def wrong_target(opened: Bundle, device: str, dtype: torch.dtype) -> Model:
        tensors = {**opened.tensors, name: opened.tensors[name] * 1.5}
        return stream_target(replace(opened, tensors=tensors), device, dtype)

    monkeypatch.setattr(verifying, "stream_target", wrong_target)
    found = verify_bundle(bundle)
    assert found.verdict == "refuse" and found.culprit == "model.layers.2.mlp"
    failed = [(check.name, check.operator) for check in found.checks if check.outcome == "fail"]
    assert "module replay" in dict(failed) and failed[0][0] == "weights as loaded"
    assert ("module replay", "experts.5.down_proj") in failed or not lent


def test_golden_files_stay_below_a_share_of_the_weights_and_say_what_was_left_out(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert captured(bundle).listed.bound == ""
    weights = (bundle / "model.safetensors").stat().st_size
    monkeypatch.setattr(capturing, "FREE_BYTES", 100_000)
    listed = captured(bundle).listed
    kept = (bundle / capturing.TENSORS).stat().st_size
    assert kept < 100_000 + 0.05 * weights + 10_000
    assert listed.bounded and "of 4 prompts, and up to" in listed.bound and "hold no more" in listed.bound
    assert len(listed.sequences) == 4


def test_no_more_tokens_are_replayed_than_are_enough(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "MOST_TOKENS", 50)
    listed = captured(bundle).listed
    assert (len(listed.rows), len(listed.rows[0])) == (2, 24)
    assert (
        listed.bound == "golden inputs are of 2 of 4 prompts, and up to 24 of 24 tokens of each: 50 tokens are enough"
    )


def test_an_open_bundle_reads_tensors_when_they_are_asked_for(bundle: Path) -> None:
    whole = read_bundle(bundle).tensors
    with open_bundle(bundle) as opened:
        assert set(opened.tensors) == set(whole)
        assert all(torch.equal(opened.tensors[name], tensor) for name, tensor in whole.items())
        with pytest.raises(KeyError):
            opened.tensors["model.layers.3.embed_tokens.weight"]
