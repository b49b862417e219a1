"""What a verification asks of which model: the target once, and of emulator and twins what the capture did not ask."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from isthmus.formats.files.bundle import Bundle, open_bundle, write_bundle
from isthmus.formats.parts import pieces
from isthmus.model.model import Model
from isthmus.parity import replay as replaying
from isthmus.parity import verify as verifying
from isthmus.parity.capture import FIRST, TOKENS, CaptureOptions, GoldenSet, capture, synthetic_prompts
from isthmus.parity.coverage import check_coverage
from isthmus.parity.manifest import add_file, write_manifest
from isthmus.parity.replay import Replayer
from isthmus.parity.target import DTYPES, stream_target, stream_twin
from isthmus.parity.tokens import Candidate, GoldenSequence, ask_tokens, compare_tokens
from isthmus.parity.twins import ENOUGH, TWINS
from isthmus.parity.verify import DISTANCE, LOSS, Target, verify_bundle
from isthmus.records import Check, ParityVerdict
from tests.support.bundles import TinyTokenizer
from tests.support.small import architecture

SMALL = architecture(hidden_size=64, q_lora_rank=32, swiglu_limit=2.0, initializer_range=0.1)
STATE = Model(SMALL).initialise(3).state_dict()
OF_TOKENS = (DISTANCE, LOSS)


def captured(folder: Path, sequences: int, form: str = "w8a8", options: CaptureOptions | None = None) -> Path:
    write_bundle(folder, form, STATE, SMALL, TinyTokenizer())
    capture(folder, STATE, synthetic_prompts(SMALL.vocab_size, sequences, 24), options)
    write_manifest(folder, coverage=check_coverage(STATE, folder)[0], architecture=SMALL)
    return folder


@pytest.fixture(scope="module", params=[6, ENOUGH], ids=["few", "enough"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captured(tmp_path_factory.mktemp("passes") / "bundle", request.param)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many rows of tokens pass through whole models, by model."""
    found, hidden = Counter[int](), Model.hidden

    def counted(model: Model, tokens: torch.Tensor, **given: object) -> torch.Tensor:
        found[id(model)] += len(tokens)
        return hidden(model, tokens, **given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Model, "hidden", counted)
    return found


def of_tokens(verdict: ParityVerdict) -> list[Check]:
    return [check for check in verdict.checks if check.name in OF_TOKENS]


def without_words(checks: list[Check]) -> list[Check]:
    return [check.model_copy(update={"detail": ""}) for check in checks]


def test_golden_sequences_pass_through_the_target_alone(bundle: Path, rows: Counter[int]) -> None:
    verdict = verify_bundle(bundle)
    assert verdict.verdict == "pass", [check for check in verdict.checks if check.outcome != "pass"]
    assert list(rows.values()) == [len(GoldenSet(bundle).listed.sequences)]


def test_twins_of_another_arithmetic_are_asked_here(bundle: Path, rows: Counter[int]) -> None:
    verify_bundle(bundle, target=Target(dtype="bf16"))
    count = len(GoldenSet(bundle).listed.sequences)
    copies = 1 if count >= ENOUGH else TWINS
    assert sorted(rows.values()) == sorted([count, count, copies * count])


def test_what_was_captured_and_what_is_asked_here_give_the_same_figures(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = of_tokens(verify_bundle(bundle))
    monkeypatch.setattr(GoldenSet, "healthy", lambda *_: None)
    here = of_tokens(verify_bundle(bundle))
    assert without_words(kept) == without_words(here) and len(kept) == len(OF_TOKENS)
    assert all(check.outcome == "pass" for check in kept)


def test_what_was_captured_does_not_refuse_what_this_host_lets_pass(tmp_path: Path) -> None:
    """Numbers of another emulator and of twins of it, none of which are those of this host."""
    folder = captured(tmp_path / "bundle", 6)
    expected = of_tokens(verify_bundle(folder))
    tensors = safetensors.torch.load_file(folder / TOKENS)
    other = tensors["emulator"] - 1.0
    changed = {**tensors, "emulator": other, "twins.fp32": other.expand(TWINS, -1).contiguous()}
    add_file(folder, TOKENS, safetensors.torch.save(changed))
    found = of_tokens(verify_bundle(folder))
    assert "asked when it was captured" in expected[0].detail and "asked on this host" in found[0].detail
    assert all(check.outcome == "pass" for check in (*expected, *found))


def test_a_target_that_computes_something_else_is_refused_by_what_was_captured(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight_scale"

    def wrong_target(opened: Bundle, device: str, dtype: torch.dtype) -> Model:
        tensors = {**opened.tensors, name: opened.tensors[name] * 3}
        return stream_target(replace(opened, tensors=tensors), device, dtype)

    monkeypatch.setattr(verifying, "stream_target", wrong_target)
    kept = of_tokens(verify_bundle(bundle))
    monkeypatch.setattr(GoldenSet, "healthy", lambda *_: None)
    here = of_tokens(verify_bundle(bundle))
    assert kept == here and any(check.outcome == "fail" for check in kept)


def test_a_bundle_says_of_which_arithmetics_twins_were_asked(tmp_path: Path) -> None:
    folder = captured(tmp_path / "bundle", 3, options=CaptureOptions(arithmetics=("bf16",)))
    golden = GoldenSet(folder)
    found = golden.healthy("bf16")
    assert found is not None and golden.healthy("fp32") is None
    tokens = sum(len(completion) for _, completion in golden.listed.sequences)
    assert found.twins.shape == (TWINS, tokens) and found.emulator.first.shape == (tokens,)
    assert torch.equal(found.emulator.logprobs, golden.token_logprobs().emulator)
    assert found.twins.unique(dim=0).shape == found.twins.shape, "each copy has noise of its own"
    assert FIRST in safetensors.torch.load_file(folder / TOKENS)


def test_one_model_says_the_same_alone_and_in_a_comparison(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        model, other = opened.build(), opened.stream()
        # Of several lengths, and in no order.
        rows = [list(range(2, 2 + size)) for size in (9, 4, 17, 6, 4)]
        sequences = [GoldenSequence(row[:-2], row[-2:]) for row in rows]
        found, told = compare_tokens(model, other, sequences), ask_tokens(Candidate(model), sequences)
        copied = ask_tokens(Candidate(model), sequences, copies=3)
    assert torch.equal(told.logprobs, found.logprobs[0]) and torch.equal(told.first, found.first[0])
    for logprobs, first in zip(copied.logprobs, copied.first, strict=True):
        torch.testing.assert_close(logprobs, told.logprobs, atol=0.05, rtol=0.05)
        assert len(first) == len(told.first)
    assert ask_tokens(Candidate(model), []).logprobs.shape == (0,)


@pytest.mark.parametrize("lent", [False, True], ids=["whole", "one by one"])
@pytest.mark.parametrize("form", ["w8a8", "bf16", "fp8"])
def test_noise_on_the_emulators_answers_is_what_a_twin_answers(
    form: str, lent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = captured(tmp_path / "bundle", 3, form)
    monkeypatch.setattr(pieces, "WHOLE_EXPERTS", 0 if lent else pieces.WHOLE_EXPERTS)

    def floors() -> dict[str, float]:
        dtype = DTYPES["fp32"]
        with open_bundle(folder) as opened:
            replayer = Replayer(GoldenSet(folder), opened.stream(), stream_twin(opened, dtype), dtype)
            return replayer.compare(stream_target(opened, "cpu", dtype)).floors.of_kind

    derived = floors()
    monkeypatch.setattr(replaying, "noise_of", lambda _twin: None)
    assert derived == floors()
