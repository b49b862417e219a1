"""Steps that take each other's weights and data: sampling, a second fine-tuning of the base, a student, evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.progress import Watch
from isthmus.records import SampleRecord, evaluation_of, read_weights, step_is_done, step_record
from isthmus.run import RunFolder, sha256_file
from isthmus.stages import steps
from isthmus.trainer.checkpoint import load_model_state
from tests.support.ranks_recipe import planned

SFT = """
batch_size = 4
optimizer = { name = "adamw", learning_rate = 3e-3 }
"""
RECIPE = f"""
name = "steps"

[model]
preset = "r-nano"
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 24
num_hidden_layers = 1
first_k_dense_replace = 0
num_nextn_predict_layers = 0

[models.student]
model_type = "llama"
vocab_size = 400
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
max_position_embeddings = 384
rope_theta = 100.0
rms_norm_eps = 1e-6

[pools.home]
chip = "cpu"
threads = 1

[place]
train = ["home"]
rollout = ["home"]
serve = ["home"]

[tasks.countdown]
largest = 4
teacher_give_up = 0.9

[[step]]
name = "base"
kind = "sft"
data = ["countdown"]
steps = 6
{SFT}
[[step]]
name = "selected"
kind = "sample"
from = "base"
prompts = 6
samples_per_prompt = 2
prompts_per_batch = 2
max_new_tokens = 24
keep = []
rollout_format = "fp32"

[[step]]
name = "second-sft"
kind = "sft"
from = "base"
data = {{ selected = 1, countdown = 1 }}
steps = 2
{SFT}
[[step]]
name = "student"
kind = "sft"
from = "model"
model = "student"
data = ["countdown"]
steps = 2
{SFT}
[evaluation]
after = ["second-sft", "student"]
problems = 5
samples = 2
max_new_tokens = 12
format = "fp32"
compare = [["student", "second-sft"]]
"""
STEPS = ("base", "selected", "second-sft", "student")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> Path:
    """A run whose model was sampled; an untrained one seldom ends an answer, so rows are written as it would write."""
    folder = planned(tmp_path_factory.mktemp("steps") / "run", RECIPE)
    run = RunFolder.open(folder)
    for name in ("base", "selected"):
        steps.execute(run, Watch(quiet=True), name=name)
    return folder


def copy_of(folder: Path, to: Path) -> RunFolder:
    shutil.copytree(folder, to)
    return RunFolder.open(to)


def rows_of(run: RunFolder) -> list[dict]:
    record = step_record(run, "selected")
    assert isinstance(record, SampleRecord)
    return [json.loads(line) for line in (run.path / record.samples).read_text(encoding="utf-8").splitlines()]


def test_a_data_set_says_where_it_comes_from_and_what_was_dropped(sampled):
    run = RunFolder.open(sampled)
    record, base = step_record(run, "selected"), read_weights(run, "base")
    assert isinstance(record, SampleRecord)
    assert record.weights_of == "base" and record.weights_sha256 == base.checkpoint_sha256
    assert record.generated == 12 and record.prompts == 6
    assert record.kept + sum(record.dropped.values()) == record.generated
    assert len(rows_of(run)) == record.kept
    trained = {(row["prompt"], row["task"]) for row in rows_of(run)}
    assert all(task == "countdown" for _, task in trained)


def test_sampling_goes_on_after_the_batches_that_are_answered_and_gives_the_same_data(sampled, tmp_path):
    run = copy_of(sampled, tmp_path / "run")
    (run.path / "steps" / "selected" / "record.json").unlink()
    (run.path / "steps" / "selected" / "batches" / "000001.json").unlink()
    steps.execute(run, Watch(quiet=True), name="selected")
    before, after = (step_record(one, "selected") for one in (RunFolder.open(sampled), run))
    assert isinstance(before, SampleRecord) and isinstance(after, SampleRecord)
    assert after.samples_sha256 == before.samples_sha256
    assert [event["from_step"] for event in run.events("selected", "resume")] == [2]


def with_rows(run: RunFolder) -> None:
    """Put two answers into the data, as a model that can end one would have given them."""
    record = step_record(run, "selected")
    assert isinstance(record, SampleRecord)
    row = {"id": "x", "task": "countdown", "prompt": "Make 4 from 1 1 2.", "messages": [], "tokens": 9, "seed": 1}
    rows = [row | {"thought": "1 + 1\n", "answer": answer} for answer in ("(1 + 1) + 2", "2 + (1 + 1)")]
    path = run.path / record.samples
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    update = {"samples_sha256": sha256_file(path), "kept": 2}
    run.write_record("steps/selected/record", record.model_copy(update=update))


def test_the_second_fine_tuning_starts_from_the_base_and_both_models_are_asked_the_same(sampled, tmp_path):
    run = copy_of(sampled, tmp_path / "run")
    with_rows(run)
    for name in ("second-sft", "student"):
        steps.execute(run, Watch(quiet=True), name=name)
    base, second, student = (read_weights(run, name) for name in ("base", "second-sft", "student"))
    assert (second.started_from, second.started_from_sha256) == ("base", base.checkpoint_sha256)
    assert (student.started_from, student.started_from_sha256) == ("model", None)
    state = load_model_state(run.path / student.checkpoint, student.checkpoint_sha256)
    assert state["model.embed_tokens.weight"].shape == (400, 16), "the student's own architecture"
    found = [evaluation_of(run, name) for name in ("second-sft", "student")]
    assert found[0] is not None and found[1] is not None and found[0].problems == found[1].problems
    assert all(len(row) == 2 for one in found if one for row in one.correct) and len(found[0].problems) == 5
    assert all(step_is_done(run, name) for name in STEPS)

    (run.path / "steps" / "student" / "evaluation.json").unlink()
    assert not step_is_done(run, "student")
    steps.execute(run, Watch(quiet=True), name="student")
    assert evaluation_of(run, "student") is not None
    assert read_weights(run, "student") == student, "it is asked again, and not trained again"


def test_data_that_was_touched_is_not_learnt(sampled, tmp_path):
    run = copy_of(sampled, tmp_path / "run")
    with_rows(run)
    record = step_record(run, "selected")
    assert isinstance(record, SampleRecord)
    path = run.path / record.samples
    path.write_text(path.read_text().replace("(1 + 1) + 2", "(1 + 1) + 3"), encoding="utf-8")
    with pytest.raises(DamagedFile, match="not what the record of selected says"):
        steps.execute(run, Watch(quiet=True), name="second-sft")


def test_a_step_whose_start_is_not_done_says_what_to_run(tmp_path):
    run = RunFolder.open(planned(tmp_path / "run", RECIPE))
    with pytest.raises(IsthmusError, match=r"isthmus run .* --until base"):
        steps.execute(run, Watch(quiet=True), name="second-sft")
