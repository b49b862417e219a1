"""Checkpoints: what is stored, what moves between worlds, and what is lost when something breaks."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import shutil
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.model.digest import tensor_sha256
from isthmus.model.model import Model
from isthmus.recipe.steps import OptimizerSection
from isthmus.trainer import checkpoint_files
from isthmus.trainer.checkpoint import (
    CheckpointWriter,
    SavedCheckpoint,
    TrainingState,
    load_latest,
    load_model_state,
    restore_rng,
    rng_state,
)
from isthmus.trainer.optimizer import Optimizer
from tests.support.checkpoint_ranks import (
    blank,
    damaged_for_one,
    differing,
    flushed_inodes,
    load_and_compare,
    missing_on_one,
    save_then_fail,
    train_model,
    whole_state,
    write_and_hang,
)
from tests.support.small import architecture
from tests.support.worlds import in_world, server

CPU = torch.device("cpu")


def unexpected(message: str) -> None:
    raise AssertionError(message)


def save(root, *steps: int, state: TrainingState | None = None, keep: int = 9) -> SavedCheckpoint:
    writer = CheckpointWriter(root, keep, None)
    for step in steps:
        writer.save(step, state or whole_state())
    return writer.finish()


def load(root) -> tuple[int, list[str], list[str]]:
    """(step that was loaded, what was said to be damaged, keys of the loaded state that are wrong)."""
    named: list[str] = []
    expected = whole_state()
    state = blank(expected)
    loaded = load_latest(root, state, None, damaged=named.append)
    return loaded.step, named, differing(state, expected)


def test_a_round_trip_is_bitwise_and_fills_views_in_place(tmp_path):
    written = save(tmp_path, 7)
    expected = whole_state()
    state = blank(expected)
    stack = torch.zeros(4, 6, 2)
    for index in range(4):
        state.model[f"expert.{index}.gate"], state.model[f"expert.{index}.up"] = stack[index].chunk(2)
    loaded = load_latest(tmp_path, state, None, damaged=unexpected)
    assert (loaded.folder, loaded.step, loaded.extra) == (tmp_path / "step-000007", 7, expected.extra)
    assert (loaded.sha256, loaded.torch) == (written.sha256, torch.__version__)
    assert differing(state, expected) == []
    assert torch.equal(stack[2, 3:], expected.model["expert.2.up"])


def test_no_checkpoint_is_none_and_leaves_the_state_alone(tmp_path):
    state = whole_state()
    assert load_latest(tmp_path / "nowhere", state, None, damaged=unexpected) is None
    assert differing(state, whole_state()) == []
    assert CheckpointWriter(tmp_path, 1, None).finish() is None


def test_what_is_on_the_disk_reads_without_isthmus_and_hashes_as_the_manifest_says(tmp_path):
    folder = save(tmp_path, 1).folder
    expected = whole_state()
    stored = load_file(folder / "model-00000.safetensors")
    assert stored.keys() == expected.model.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.model.items())
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    assert (manifest["torch"], manifest["world_size"]) == (torch.__version__, 1)
    for key, tensor in expected.keyed.items():
        (chunk,) = manifest["tensors"][key]["chunks"]
        assert chunk["sha256"] == tensor_sha256(tensor)
    assert not [path for path in folder.iterdir() if path.suffix not in (".json", ".safetensors")]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, original = threading.Event(), checkpoint_files.save_file

    def slow(tensors, path):
        assert may_write.wait(20)
        original(tensors, path)

    monkeypatch.setattr(checkpoint_files, "save_file", slow)
    state = whole_state()
    writer = CheckpointWriter(tmp_path, 3, None)
    writer.save(1, state)
    for tensor in state.keyed.values():
        tensor.zero_()
    assert not (tmp_path / "step-000001").exists()
    second = threading.Thread(target=writer.save, args=(2, whole_state()))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "a second save does not wait for the first"
    may_write.set()
    second.join()
    assert writer.finish() == writer.finish() and writer.finish().step == 2
    shutil.rmtree(tmp_path / "step-000002")
    assert load(tmp_path) == (1, [], [])


def test_checkpoints_are_kept_to_a_number_and_leftovers_removed(tmp_path):
    (tmp_path / ".step-000009.tmp").mkdir()
    save(tmp_path, 1, 2, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    save(tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_a_damaged_later_checkpoint_does_not_push_a_whole_one_out(tmp_path):
    save(tmp_path, 20, 40)
    damage_byte(tmp_path / "step-000040" / "manifest.json", 0.5)
    assert load(tmp_path)[0] == 20
    save(tmp_path, 30, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000030"]


def test_steps_are_ordered_as_numbers(tmp_path):
    save(tmp_path, 999_999, 1_000_000)
    assert load(tmp_path)[0] == 1_000_000


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "no space left on the disk for .*step-000002"),
        (PermissionError(13, "Permission denied"), "step-000002 cannot be written"),
    ],
)
def test_a_failed_write_is_a_message_and_the_older_one_stays(tmp_path, monkeypatch, error, message):
    save(tmp_path, 1)

    def fail(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files.os, "fsync", fail)
        writer = CheckpointWriter(tmp_path, 1, None)
        writer.save(2, whole_state())
        with pytest.raises(IsthmusError, match=message):
            writer.save(3, whole_state())
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert load(tmp_path) == (1, [], [])
    writer.save(4, whole_state())
    assert writer.finish().step == 4


def test_all_of_a_checkpoint_is_flushed_to_the_disk(tmp_path):
    with flushed_inodes() as flushed:
        folder = save(tmp_path, 1).folder
    assert {path.stat().st_ino for path in (tmp_path, folder, *folder.iterdir())} <= flushed


def test_extra_must_be_json(tmp_path):
    writer = CheckpointWriter(tmp_path, 1, None)
    with pytest.raises(ValueError, match="JSON"):
        writer.save(1, TrainingState({}, {}, {"rate": float("nan")}))
    extra = {"position": 3}
    writer.save(1, TrainingState({}, {}, extra))
    extra["position"] = 4
    writer.finish()
    assert load_latest(tmp_path, TrainingState({}, {}, {}), None, damaged=unexpected).extra == {"position": 3}


# --- damage


def damage_byte(path, where: float, bit: int = 2) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


def drop_tensor(path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def swap_two(path) -> None:
    tensors = load_file(path)
    tensors["expert.0.gate"], tensors["expert.1.gate"] = tensors["expert.1.gate"], tensors["expert.0.gate"]
    save_file(tensors, path)


MODEL, OPTIMIZER, MANIFEST = "model-00000.safetensors", "optimizer-00000.safetensors", "manifest.json"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (MODEL, lambda path: damage_byte(path, 0.999), r"the tensor '[\w.]+' does not match its hash"),
        (OPTIMIZER, lambda path: damage_byte(path, 0.999), r"the tensor 'adam\.[\w.]+' does not match its hash"),
        (MODEL, swap_two, "the tensor 'expert.[01].gate' does not match its hash"),
        (MODEL, drop_tensor, "disagree about the tensor 'bias'"),
        (MODEL, lambda path: path.write_bytes(path.read_bytes()[:-7]), "cannot be read"),
        (MODEL, lambda path: path.write_bytes(b""), "cannot be read"),
        (OPTIMIZER, lambda path: path.unlink(), "cannot be read"),
        (MANIFEST, lambda path: path.unlink(), "is not a checkpoint: it has no manifest.json"),
        (MANIFEST, lambda path: path.write_bytes(path.read_bytes()[:-7]), "cannot be read"),
        (MANIFEST, lambda path: path.write_bytes(b"[" * 100_000), "cannot be read"),
        (MANIFEST, lambda path: path.write_text("[]"), "cannot be read"),
        (MANIFEST, lambda path: path.write_text('{"sha256": "x"}'), "cannot be read"),
        (MANIFEST, lambda path: path.write_text(path.read_text().replace('"step": 2', '"step": 3')), "match its hash"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, file, damage, message):
    save(tmp_path, 1, 2)
    path = tmp_path / "step-000002" / file
    damage(path)
    step, named, wrong = load(tmp_path)
    assert (step, wrong) == (1, [])
    assert len(named) == 1 and "step-000002" in named[0] and re.search(message, named[0])


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return (open, (str(self.sprung), "w"))


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, MANIFEST, ".metadata"])
def test_nothing_in_a_checkpoint_is_unpickled(tmp_path, file):
    save(tmp_path, 1, 2)
    sprung, zipped = tmp_path / "sprung", io.BytesIO()
    torch.save(Trap(sprung), zipped)
    for content in (pickle.dumps(Trap(sprung)), zipped.getvalue()):
        (tmp_path / "step-000002" / file).write_bytes(content)
        step, _, wrong = load(tmp_path)
        assert (step, wrong) == (2 if file == ".metadata" else 1, [])
        assert not sprung.exists()


def test_if_none_is_whole_each_is_named(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        damage_byte(tmp_path / f"step-00000{step}" / MODEL, 0.999)
    with pytest.raises(DamagedFile, match=r"no checkpoint under .*step-000002.*hash; .*step-000001.*hash.*delete"):
        load(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([MODEL, OPTIMIZER, MANIFEST]), st.floats(0, 1), st.integers(0, 7), st.booleans())
def test_no_flipped_bit_and_no_cut_gives_wrong_values(two_checkpoints, tmp_path_factory, file, where, bit, cut):
    root = tmp_path_factory.mktemp("flipped") / "root"
    shutil.copytree(two_checkpoints, root)
    path = root / "step-000002" / file
    if cut:
        path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])
    else:
        damage_byte(path, where, bit)
    step, named, wrong = load(root)
    assert wrong == []
    assert (step, len(named)) in ((1, 1), (2, 0))
    if step == 2 and not cut:
        assert file == MANIFEST, "only the layout of the JSON may change unnoticed"


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    save(root, 1, 2)
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.model.update(new=torch.zeros(2)), "model tensor 'new' is not in it"),
        (lambda s: s.optimizer.pop("adam.step.matrix"), "optimizer tensor 'adam.step.matrix' is in it, and this run"),
        (lambda s: s.model.update(bias=torch.zeros(5)), r"model tensor 'bias' is float32\[4\] in it and float32\[5\]"),
        (lambda s: s.model.update(bias=torch.zeros(4).half()), r"'bias' is float32\[4\] in it and float16\[4\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_a_tensor(tmp_path, change, message):
    save(tmp_path, 1, 2)
    state = blank(whole_state())
    change(state)
    with pytest.raises(IsthmusError, match=message) as caught:
        load_latest(tmp_path, state, None, damaged=unexpected)
    assert not isinstance(caught.value, DamagedFile)


# --- the model alone, for the next stage


def test_the_model_of_a_recorded_checkpoint(tmp_path):
    written = save(tmp_path, 1)
    (written.folder / OPTIMIZER).unlink()
    expected = whole_state().model
    found = load_model_state(written.folder, written.sha256)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_recorded_checkpoint_that_is_damaged_or_another_one(tmp_path):
    written = save(tmp_path, 1, 2)
    damage_byte(written.folder / MODEL, 0.999)
    with pytest.raises(DamagedFile, match=r"does not match its hash.*continues from step-000001"):
        load_model_state(written.folder, written.sha256)
    save(tmp_path, 2, state=TrainingState({"w": torch.ones(2)}, {}, {}))
    with pytest.raises(DamagedFile, match="not the one that was recorded"):
        load_model_state(written.folder, written.sha256)


# --- killed


def test_kill_9_while_writing_leaves_the_older_checkpoint(tmp_path):
    process = server().Process(target=write_and_hang, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / ".step-000002.tmp" / MODEL).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000002.tmp", "step-000001"]
    assert load(tmp_path) == (1, [], [])
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


# --- worlds


@pytest.fixture(scope="module")
def from_two(tmp_path_factory):
    """Checkpoints of a world of 2, the second after two failed ones, and what its ranks saw."""
    root = tmp_path_factory.mktemp("worlds") / "checkpoints"
    root.mkdir()
    return root, in_world(2, save_then_fail, root)


def test_a_failure_of_one_rank_is_raised_on_all_and_nothing_appears(from_two):
    root, seen = from_two
    for found in seen:
        assert "no space left on the disk" in found["part"] and "step-000002" in found["part"]
        assert found["after part"] == found["after manifest"] == ["step-000001"]
        assert "cannot be written" in found["manifest"]
    assert seen[0]["last"] == seen[1]["last"] != seen[0]["first"]
    assert sorted(path.name for path in root.iterdir()) == ["step-000001", "step-000004"]


def test_each_rank_flushes_what_it_wrote(from_two):
    root, seen = from_two
    for rank, found in enumerate(seen):
        own = list((root / "step-000004").glob(f"*-{rank:05d}.safetensors"))
        assert own and {path.stat().st_ino for path in own} <= found["flushed"]


def test_what_two_ranks_saved_loads_in_one(from_two):
    root, _ = from_two
    assert load(root) == (4, [], [])
    folder = root / "step-000004"
    expected = whole_state().model
    found = load_model_state(folder, checkpoint_files.sha256_file(folder / MANIFEST))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_two_ranks_saved_loads_in_four(from_two):
    root, _ = from_two
    assert in_world(4, load_and_compare, root) == [(4, whole_state().extra, [])] * 4


def test_every_value_is_stored_once_and_both_ranks_write(from_two):
    root, _ = from_two
    folder = root / "step-000004"
    manifest = json.loads((folder / MANIFEST).read_text())["manifest"]
    assert manifest["world_size"] == 2
    sizes = {
        key: sum(torch.Size(chunk["shape"]).numel() for chunk in tensor["chunks"])
        for key, tensor in manifest["tensors"].items()
    }
    assert sizes == {key: tensor.numel() for key, tensor in whole_state().keyed.items()}
    assert {"model-00000.safetensors", "model-00001.safetensors"} <= {path.name for path in folder.iterdir()}


def test_what_one_saved_loads_in_two_and_disagreement_is_raised_on_both(tmp_path):
    save(tmp_path, 3)
    assert in_world(2, load_and_compare, tmp_path) == [(3, whole_state().extra, [])] * 2
    for said in in_world(2, missing_on_one, tmp_path):
        assert "model tensor 'new' is not in it" in said[0]
        assert "model tensor 'expert.3.up' is in it" in said[1]


def test_damage_that_one_rank_finds_is_named_on_all(from_two, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(from_two[0], root)
    damage_byte(root / "step-000004" / "model-00001.safetensors", 0.999)
    seen = in_world(2, damaged_for_one, root)
    assert [step for step, _ in seen] == [1, 1]
    assert seen[0] == seen[1] and "model-00001.safetensors: the tensor" in seen[0][1][0]


# --- resuming


MUON = OptimizerSection(name="muon", learning_rate=1e-2, matrix_learning_rate=2e-2, warmup_steps=2)


def train(model: Model, optimizer: Optimizer, steps: range) -> None:
    """Steps on gradients that depend on torch's random numbers."""
    for step in steps:
        tokens = torch.randint(97, (2, 12))
        optimizer.zero_grad()
        model(tokens).logsumexp(-1).square().mean().backward()
        optimizer.step(step)


def test_resuming_is_bitwise(tmp_path):
    torch.manual_seed(3)
    straight = Model(architecture()).initialise(6)
    optimizer = Optimizer(straight, MUON, 8)
    train(straight, optimizer, range(4))
    writer = CheckpointWriter(tmp_path, 2, None)
    writer.save(4, TrainingState(straight.state_dict(), optimizer.state(), {"rng": rng_state(CPU)}))
    train(straight, optimizer, range(4, 8))
    writer.finish()

    torch.manual_seed(4)
    resumed = Model(architecture())
    optimizer = Optimizer(resumed, MUON, 8)
    state = TrainingState(resumed.state_dict(), optimizer.state(), {})
    loaded = load_latest(tmp_path, state, None, damaged=unexpected)
    assert restore_rng(loaded.extra["rng"], CPU)
    train(resumed, optimizer, range(loaded.step, 8))
    theirs = resumed.state_dict()
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_sharded_run_goes_on_bitwise_in_its_world_and_closely_in_others(tmp_path):
    experts_too = {"expert": 2}
    straight = in_world(4, train_model, tmp_path, experts_too, 4)[0][4:]
    assert in_world(4, train_model, tmp_path, experts_too, None)[0] == straight
    assert in_world(4, train_model, tmp_path, {"replicate": 2}, None)[0] == pytest.approx(straight, rel=1e-6)
    assert in_world(2, train_model, tmp_path, {}, None)[0] == pytest.approx(straight, rel=1e-6)
    assert train_model(0, tmp_path, {}, None) == pytest.approx(straight, rel=1e-6)


def test_random_states():
    stored = json.loads(json.dumps(rng_state(CPU)))
    first, other = torch.rand(5), random.random()
    assert restore_rng(stored, CPU)
    assert torch.equal(torch.rand(5), first)
    assert random.random() != other
    assert not restore_rng(stored, torch.device("meta"))
