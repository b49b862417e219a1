"""The hand-off on a small model: what it writes when it passes, and what it refuses."""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from isthmus.data.corpus import prompt_ids, run_tokenizer
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Completion, EngineError
from isthmus.errors import DamagedFile, GateRefused, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import file_hashes, read_bundle
from isthmus.formats.files.golden import PROMPTS, read_golden
from isthmus.model.model import Model
from isthmus.parity import engine as engine_parity
from isthmus.parity import verify
from isthmus.parity.gate import COST
from isthmus.parity.seal import read_verdict, verify_seal
from isthmus.parity.signing import new_key
from isthmus.parity.verify import Target, verify_bundle
from isthmus.progress import Watch
from isthmus.recipe.read import parse_recipe
from isthmus.records import Check, HandoffRecord, Placement, PlanRecord, RlRecord, read_weights
from isthmus.run import Figure, RunFolder, write_atomic
from isthmus.stages import handoff
from isthmus.stages.handoff import crossing
from isthmus.tasks import load_tasks
from isthmus.tasks.countdown import Countdown
from isthmus.trainer.checkpoint import CheckpointWriter, TrainingState
from tests.support.bundles import published
from tests.support.sampled import SampledHere, odd_is_right
from tests.support.small import TINY

ADAMW = {"name": "adamw", "learning_rate": 1e-3}
RECIPE = {
    "name": "small",
    "model": {**TINY, "vocab_size": 512, "max_position_embeddings": 96, "initializer_range": 0.1},
    "pools": {
        "home": {"chip": "cpu", "threads": 1},
        "away": {"chip": "ascend-910b-313t", "rehearsed": True, "threads": 1},
    },
    "place": {"train": ["home"], "rollout": ["away"], "serve": ["away"]},
    "step": [
        {"name": "taught", "kind": "sft", "steps": 1, "optimizer": ADAMW},
        {"name": "reinforced", "kind": "rl", "from": "taught", "steps": 1, "max_new_tokens": 12, "optimizer": ADAMW},
    ],
    "handoff": {
        "golden_prompts": 12,
        "heldout_problems": 30,
        "max_mean_kl": 0.05,
        "min_top1_agreement": 0.85,
        "max_accuracy_drop": 0.3,
    },
}


class Broken(SampledHere):
    def __init__(self, folder: Path, **options):
        super().__init__(folder, **options)
        if self.rehearsed:
            self.model.model.layers[1].self_attn.o_proj.scale.mul_(2)


def tokenizer_of(run: RunFolder) -> Tokenizer:
    return run_tokenizer(run, list(load_tasks(run.recipe).values()))


def write_records(run: RunFolder, trained: dict[str, torch.Tensor] | None = None) -> None:
    state = Model(run.recipe.model).initialise(0).state_dict() if trained is None else trained
    checkpoints = CheckpointWriter(run.step_folder("reinforced") / "checkpoints", keep=1, group=None)
    checkpoints.save(1, TrainingState(state, {}, {}))
    saved = checkpoints.finish()
    tokenizer_of(run)
    base = {"recipe_sha256": run.recipe.digest(), "started": 0.0, "ended": 1.0}
    stages = {"train": "home", "rollout": "away", "serve": "away"}
    placements = [Placement(stage=stage, pool=pool, reason="") for stage, pool in stages.items()]
    run.write_record("plan", PlanRecord(**base, placements=placements, rejected=[], estimate={}))
    some = Figure.measured(1.0, "%", "a test", rehearsed=False)
    figures = ("accuracy_before", "accuracy_after", "accuracy_gain", "thought_tokens_before", "thought_tokens_after")
    record = RlRecord(
        **base,
        step="reinforced",
        pool="home",
        started_from="taught",
        rollout_pool="away",
        rollout_rehearsed=True,
        algorithm="grpo",
        steps=1,
        resumed_from=[],
        checkpoint=str(saved.folder.relative_to(run.path)),
        checkpoint_sha256=saved.sha256,
        weight_version=1,
        heldout_problems=1,
        **dict.fromkeys(figures, some),
        figures={},
        sample_before="",
        sample_after="",
    )
    run.write_record("steps/reinforced/record", record)


@functools.cache
def template(parent: Path, limits: tuple[tuple[str, object], ...]) -> Path:
    path = parent / f"run{len(list(parent.iterdir()))}"
    write_records(RunFolder.create(path, parse_recipe({**RECIPE, "handoff": {**RECIPE["handoff"], **dict(limits)}})))
    return path


@pytest.fixture
def start(tmp_path, tmp_path_factory, monkeypatch):
    """Makes a run folder that has come to the hand-off, and takes out of it what needs another process."""
    monkeypatch.setattr(crossing, "LocalEngine", SampledHere)
    monkeypatch.setattr(Countdown, "accuracy", odd_is_right)

    def make(**limits) -> RunFolder:
        shutil.copytree(template(templates, tuple(limits.items())), tmp_path / "run")
        return RunFolder.open(tmp_path / "run")

    templates = tmp_path_factory.getbasetemp() / "handoff-templates"
    templates.mkdir(exist_ok=True)
    return make


def execute(run: RunFolder) -> HandoffRecord:
    return handoff.execute(run, Watch(Console(quiet=True)))


HOSTS_OWN = (
    "w8a8: the emulator is the source's",
    f"w8a8: {COST}",
    "w8a8: every source tensor is accounted for",
)
"""Checks of the target bundle that are computed without the target."""


def outcomes(run: RunFolder) -> dict[str, str]:
    record = run.read_record("parity", HandoffRecord)
    assert record is not None
    return {check.name: check.outcome for check in record.checks}


def seals(run: RunFolder) -> list[str]:
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("seal.json"))


def test_a_healthy_model_is_sealed_in_both_formats(start):
    run = start()
    record = execute(run)
    assert record.verdict == "pass"
    assert all(
        check.outcome == "pass" or (check.layer, check.outcome) == ("config", "caution") for check in record.checks
    )
    assert record == run.read_record("parity", HandoffRecord)
    seal = verify_seal(run.path / "bundle" / "w8a8", record.seal_id)
    assert seal.lineage.checkpoint_sha256 == read_weights(run, "reinforced").checkpoint_sha256
    assert seal.lineage.recipe_sha256 == run.recipe.digest()
    assert verify_seal(run.path / "bundle" / "bf16").format == "bf16"
    assert not (run.path / "handoff" / "fp32").exists()


def test_the_bundle_holds_the_trained_weights(start):
    run = start()
    execute(run)
    trained = Model(run.recipe.model).initialise(0).state_dict()
    exported = get_format("w8a8").export(trained, run.recipe.model)
    tensors = read_bundle(run.path / "bundle" / "w8a8").tensors
    assert all(torch.equal(tensors[name], exported[name]) for name in exported)


def test_figures_of_the_rehearsed_pool_say_so(start):
    run = start()
    record = execute(run)
    kinds = {name: figure.kind for name, figure in record.figures.items()}
    kinds |= {check.name: check.figure.kind for check in record.checks if check.figure}
    for name, kind in kinds.items():
        here = name.startswith("bf16") or name in ("accuracy.reference", *HOSTS_OWN)
        wanted = "measured" if here else "rehearsed"
        assert kind == wanted, name
    assert {check.limit.kind for check in record.checks if check.limit} == {"declared", "measured"}


@pytest.mark.parametrize(("kernels", "told"), [("native", 0), ("torch: there is no C compiler here", 2)])
def test_an_engine_without_its_compiled_layers_is_told_of(start, monkeypatch, kernels, told):
    monkeypatch.setattr(SampledHere, "kernels", kernels)
    execute(run := start())
    assert [event["why"] for event in run.events("handoff", "fallback")] == [kernels] * told


def test_every_check_has_an_event_and_a_row(start):
    run = start()
    record = execute(run)
    names = [check.name for check in record.checks]
    assert [event["name"] for event in run.events("handoff", "check")] == names and len(set(names)) > 12
    order = [event["event"] for event in run.events("handoff")]
    assert order[0] == "start" and order[-2:] == ["verdict", "end"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(handoff.render(record))
    text = console.export_text()
    told = [check.name for check in record.checks if check.outcome != "pass" or check.name.endswith(COST)]
    assert all(name in text for name in told) and "[" in text
    passed = sum(check.outcome == "pass" and check.layer == "task" for check in record.checks)
    assert f"{passed} of task" in text


def test_sealed_bundles_have_golden_answers_of_their_own_model(start):
    run = start()
    execute(run)
    heldout = load_tasks(run.recipe)["countdown"].heldout
    prompts = [prompt_ids(tokenizer_of(run), problem) for problem in heldout[:PROMPTS]]
    for name in ("bf16", "w8a8"):
        folder = run.path / "bundle" / name
        golden, model = read_golden(folder), read_bundle(folder).build()
        assert golden is not None and golden.format == name
        assert [answer.prompt for answer in golden.answers] == prompts
        for answer in golden.answers:
            with torch.no_grad():
                rows = model(torch.tensor([[*answer.prompt, *answer.tokens]]))[0, len(answer.prompt) - 1 : -1]
            assert rows.argmax(-1).tolist() == answer.tokens


def test_a_gate_that_refuses_seals_nothing_and_names_the_check(start):
    run = start(max_mean_kl=1e-7)
    with pytest.raises(GateRefused, match=r"w8a8: mean KL: .* is outside the limit") as caught:
        execute(run)
    assert caught.value.exit_code == 1 and "top-1 agreement" not in str(caught.value)
    record = run.read_record("parity", HandoffRecord)
    assert record is not None and record.verdict == "refuse" and record.seal_id is None
    assert outcomes(run)["w8a8: mean KL"] == "fail"
    assert seals(run) == []
    with pytest.raises(GateRefused, match="not sealed"):
        verify_seal(run.path / "bundle" / "w8a8")


def test_a_format_that_loses_scales_is_refused(start, monkeypatch):
    """A real fault of a real engine: rows of kv_a's scales were lost, and the model spoke noise."""
    healthy = type(get_format("w8a8")).export_one

    def loses_scales(self, name, tensor, architecture, calibration=None):
        stored = healthy(self, name, tensor, architecture, calibration)
        for key, one in stored.items():
            if key.endswith(("kv_a_proj_with_mqa.weight_scale", "o_proj.weight_scale")):
                one[: len(one) // 2] *= 1e-6
        return stored

    run = start()
    monkeypatch.setattr(type(get_format("w8a8")), "export_one", loses_scales)
    with pytest.raises(GateRefused, match="w8a8: mean KL"):
        execute(run)
    assert outcomes(run)["bf16: mean KL"] == "pass" and seals(run) == []
    record = run.read_record("parity", HandoffRecord)
    assert record is not None and (record.culprit or "").endswith(("kv_a_proj_with_mqa", "o_proj"))


def test_the_ledger_keeps_both_costs_of_every_block(start):
    record = execute(start())
    layers = RECIPE["model"]["num_hidden_layers"] + 1
    assert [row.module for row in record.ledger] == [
        f"model.layers.{index}.{part}" for index in range(layers) for part in ("self_attn", "mlp")
    ]
    assert all(0 < (row.quantisation or 0) < 0.25 and (row.chip or 0) <= (row.floor or 0) for row in record.ledger)


def test_the_bundle_carries_what_another_machine_needs_to_verify_it(start, tmp_path):
    run = start()
    execute(run)
    folder = tmp_path / "elsewhere"
    shutil.copytree(run.path / "bundle" / "w8a8", folder)
    for name in ("seal.json", "verdict.json"):
        (folder / name).unlink()
    write_atomic(folder / "checksums.json", json.dumps(file_hashes(folder)).encode())
    assert verify_bundle(folder, target=Target(dtype="bf16")).verdict == "pass"


@pytest.mark.parametrize(
    "options",
    [{"format": "w8a8_static"}, {"format": "modelslim"}, {"balance": True}, {"rounding": "gptq"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_formats_and_options_pass_the_whole_gate(start, options):
    limits = {"max_mean_kl": 0.3, "min_top1_agreement": 0.6, "max_accuracy_drop": 0.5}
    run = start(**options, **limits, calibration_prompts=6)
    record = execute(run)
    assert record.verdict == "pass" and record.format == options.get("format", "w8a8")
    if record.format == "w8a8":
        plain = get_format("w8a8").export(Model(run.recipe.model).initialise(0).state_dict(), run.recipe.model)
        stored = read_bundle(run.path / "bundle" / "w8a8").tensors
        assert any(not torch.equal(stored[name], plain[name]) for name in plain), "the option was honoured"


def test_a_format_that_the_target_cannot_run_is_refused_before_anything_is_computed(start, monkeypatch):
    run = start(format="fp8")
    monkeypatch.setattr(crossing, "LocalEngine", None)
    with pytest.raises(GateRefused, match="'fp8' on ascend-910b-313t"):
        execute(run)
    assert seals(run) == []


def test_a_key_in_the_recipe_signs_the_seal(start, tmp_path):
    public = new_key(tmp_path / "gate.pem")
    run = start(sign_key=tmp_path / "gate.pem")
    record = execute(run)
    seal = verify_seal(run.path / "bundle" / "w8a8", record.seal_id, trusted=[public])
    assert seal.signer == public


def test_an_engine_that_computes_something_else_is_refused(start, monkeypatch):
    run = start()
    monkeypatch.setattr(crossing, "LocalEngine", Broken)
    with pytest.raises(GateRefused, match="engine against healthy twins"):
        execute(run)
    assert outcomes(run)["w8a8: mean KL"] == "pass" and outcomes(run)[f"w8a8: {engine_parity.DISTANCE}"] == "fail"


def test_a_model_that_answers_worse_is_refused(start, monkeypatch):
    class SameAnswer(SampledHere):
        token = -1

        def generate(self, prompts, sampling, seeds):
            answers = super().generate(prompts, sampling, seeds)
            if not self.rehearsed:
                return answers
            return [[Completion([self.token] * 2, one.logprobs[:2], "length", 0, 0) for one in row] for row in answers]

    run = start()
    SameAnswer.token = tokenizer_of(run).encode("7")[0]
    monkeypatch.setattr(crossing, "LocalEngine", SameAnswer)
    with pytest.raises(GateRefused, match="accuracy, target minus reference"):
        execute(run)
    assert outcomes(run)["w8a8: accuracy, target minus reference"] == "fail"
    left = read_verdict(run.path / "bundle" / "w8a8")
    assert left is not None and left.verdict == "refuse", "`isthmus verify` would seal what is left"
    assert {check.layer for check in left.checks if check.outcome == "fail"} == {"engine", "task"}


@pytest.mark.parametrize(
    ("export", "plain", "outcome", "share"),
    [
        ("bf16", "bf16", "caution", (99, 100)),
        ("bf16-stochastic", "bf16", "pass", (85, 95)),
        ("fp32", "fp32", None, ()),
    ],
)
def test_updates_that_rounding_undoes_are_named_with_their_ways_out(start, tmp_path, export, plain, outcome, share):
    """Every weight was moved by a tenth of a step of bf16: to the nearest the bundle is the start, bit for bit."""
    begun = tmp_path / "base"
    model = Model(parse_recipe(RECIPE).model).initialise(0)
    before = published(begun, model)
    Tokenizer.train(["Make 3 from 1 2."], 300).save(begun)
    recipe = {**RECIPE, "model": {"from": str(begun)}, "handoff": {**RECIPE["handoff"], "export": export}}
    run = RunFolder.create(tmp_path / "run", parse_recipe(recipe))
    trained = {name: one.float() if "bias" in name else one.float() * (1 + 0.1 * 2**-8) for name, one in before.items()}
    write_records(run, trained)
    record = execute(run)
    assert record.verdict == "pass" and sorted(record.bundles) == sorted([plain, "w8a8"])
    (found,) = [check for check in record.checks if check.name == "bf16: updates that rounding undoes"] or [None]
    assert (found.outcome if found else None) == outcome
    stored = read_bundle(run.path / "bundle" / plain).tensors
    if found is None:
        assert all(torch.equal(stored[name], trained[name]) for name in stored)
        return
    assert found.figure is not None and share[0] <= (found.figure.value or 0) <= share[1]
    assert "base" in found.detail and "mean KL" in found.detail
    assert ('export = "fp32" in [handoff]' in found.detail) == (outcome == "caution")
    same = all(torch.equal(stored[name], before[name]) for name in stored if "bias" not in name)
    assert same == (export == "bf16")


def test_too_few_answers_are_no_proof(start):
    run = start(heldout_problems=2, golden_prompts=2, max_accuracy_drop=0.6)
    with pytest.raises(GateRefused, match="is not shown to be within the limit"):
        execute(run)
    assert outcomes(run)["w8a8: accuracy, target minus reference"] == "unknown" and seals(run) == []


def test_one_golden_sequence_tells_nothing_and_nothing_is_sealed(start):
    run = start(golden_prompts=1)
    with pytest.raises(GateRefused, match=r"w8a8: mean KL: .* is not shown to be within the limit"):
        execute(run)
    not_passed = {name for name, outcome in outcomes(run).items() if outcome == "unknown"}
    each = (COST, verify.DISTANCE, verify.LOSS, "mean KL", "top-1 agreement")
    engine = {f"w8a8: {name}" for name in (engine_parity.DISTANCE, engine_parity.LOSS)}
    assert not_passed == {f"{name}: {check}" for name in ("bf16", "w8a8") for check in each} | engine
    assert seals(run) == []


def test_what_a_layer_could_not_tell_is_not_sealed(start, monkeypatch):
    healthy = crossing.verify_bundle

    def careless(folder, **options):
        verdict = healthy(folder, **options)
        unknown = Check(layer="config", name="a question", outcome="unknown", detail="there is no answer")
        return verdict.model_copy(update={"checks": [*verdict.checks, unknown], "verdict": "pass"})

    run = start()
    monkeypatch.setattr(crossing, "verify_bundle", careless)
    with pytest.raises(GateRefused, match="w8a8: a question: there is no answer"):
        execute(run)
    assert seals(run) == []


def test_a_refusal_after_a_pass_takes_the_seal_away(start, monkeypatch):
    run = start()
    execute(run)
    assert len(seals(run)) == 2
    monkeypatch.setattr(crossing, "LocalEngine", Broken)
    with pytest.raises(GateRefused):
        execute(run)
    assert seals(run) == []


def test_a_stage_that_breaks_off_leaves_no_verdict(start, monkeypatch):
    class Dies(SampledHere):
        def generate(self, prompts, sampling, seeds):
            raise EngineError("the engine died")

    run = start()
    execute(run)
    monkeypatch.setattr(crossing, "LocalEngine", Dies)
    with pytest.raises(EngineError):
        execute(run)
    assert seals(run) == [] and run.read_record("parity", HandoffRecord) is None
    assert not (run.path / "handoff" / "fp32").exists()


def test_without_a_trained_model_it_says_what_to_run(start):
    run = start()
    (run.step_folder("reinforced") / "record.json").unlink()
    with pytest.raises(IsthmusError, match=f"isthmus run {run.path} --until reinforced"):
        execute(run)


def test_a_damaged_checkpoint_is_not_handed_off(start):
    run = start()
    weights = next(run.path.rglob("step-*/model-*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    write_atomic(weights, bytes(content))
    with pytest.raises(DamagedFile, match="does not match its hash"):
        execute(run)
    assert not (run.path / "bundle").exists()


@pytest.mark.slow
def test_the_whole_hand_off_with_engines_of_its_own(start, monkeypatch):
    run = start()
    monkeypatch.undo()
    record = execute(run)
    assert record.verdict == "pass"
    assert verify_seal(run.path / "bundle" / "w8a8", record.seal_id)
    assert sorted(path.name for path in (run.path / "handoff").iterdir()) == ["engine-fp32.log", "engine-w8a8.log"]
