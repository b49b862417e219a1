"""Training over ranks as a user meets it: one command, one voice, and whatever ends it, the same command goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from isthmus.errors import DamagedFile, IsthmusError, RanksFailed
from isthmus.launch import local
from isthmus.launch.local import run_ranks
from isthmus.progress import Watch
from isthmus.recipe.section import RecipeError
from isthmus.records import WeightsRecord, read_weights
from isthmus.run import RunFolder
from isthmus.stages import steps
from tests.support.flow_recipe import TAUGHT, isthmus
from tests.support.ranks_recipe import interrupt_group, kill_second_rank, planned, stop_at, working_on

LOSSES = ("loss", "mtp_loss", "balance_loss")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, str, str]:
    """(folder, standard output, standard error) of two ranks."""
    folder = planned(tmp_path_factory.mktemp("ranks") / "run", pools__home__ranks=2, train__expert=2)
    result = isthmus("run", folder, "--only", TAUGHT)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout, result.stderr


def record_of(folder: Path) -> WeightsRecord:
    return read_weights(RunFolder.open(folder), TAUGHT)


def test_two_ranks_start_by_themselves_and_one_speaks(uninterrupted):
    folder, output, errors = uninterrupted
    assert errors == ""
    heading, progress, done = filter(None, output.splitlines())
    assert done == f"cold-start is done. See it:  isthmus steps {folder}"
    assert heading == "3/6 cold-start (sft)" and progress.startswith("  cold-start 24/24  loss ")
    run = RunFolder.open(folder)
    lines = [event for event in run.events(TAUGHT) if event["event"] in ("start", "end")]
    assert [event["event"] for event in lines] == ["start", "end"]
    updates = run.events(TAUGHT, "step")
    assert [event["step"] for event in updates] == list(range(1, 25)) and {event["ranks"] for event in updates} == {2}
    assert len((folder / "events.jsonl").read_text().splitlines()) == len(updates) + len(lines)
    assert not (folder / "steps" / TAUGHT / "ranks").exists()


def test_two_ranks_begin_as_one(uninterrupted, tmp_path):
    one = planned(tmp_path / "one", sft__steps=24)
    steps.execute(RunFolder.open(one), Watch(quiet=True), name=TAUGHT)
    ours, theirs = (RunFolder.open(folder).events(TAUGHT, "step")[:10] for folder in (uninterrupted[0], one))
    for ours_of_step, theirs_of_step in zip(ours, theirs, strict=True):
        for name in LOSSES:
            assert ours_of_step[name] == pytest.approx(theirs_of_step[name], abs=1e-5)
        assert ours_of_step["expert_load"] == theirs_of_step["expert_load"]


@pytest.mark.long
def test_whatever_ends_it_the_same_command_goes_on_to_the_same_bytes(uninterrupted, tmp_path):
    """A rank that is killed, and Ctrl-C. The manifest holds the hashes of all tensors and the random state."""
    folder = planned(tmp_path / "run", pools__home__ranks=2, train__expert=2, supervise__restarts=0)

    code, errors = stop_at(folder, 7, kill_second_rank, TAUGHT)
    assert code == 2 and "Traceback" not in errors
    assert errors.startswith("isthmus: rank 1 stopped: killed by signal 9 (SIGKILL).\n")
    assert "same command" in errors and not working_on(folder)

    code, errors = stop_at(folder, 19, interrupt_group, TAUGHT)
    assert code == 130 and "Traceback" not in errors
    assert errors.count("Nothing is lost") == 1 and f"isthmus run {folder} --only {TAUGHT}" in errors
    assert not working_on(folder) and not (folder / "steps" / TAUGHT / "ranks").exists()

    result = isthmus("run", folder, "--only", TAUGHT)
    assert result.returncode == 0, result.stderr
    assert record_of(folder).resumed_from == [6, 18]
    assert record_of(folder).checkpoint_sha256 == record_of(uninterrupted[0]).checkpoint_sha256


def test_a_layout_that_does_not_divide_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(RecipeError, match="pool 'home': training on 2 ranks with") as refusal:
        planned(tmp_path / "run", pools__home__ranks=2, train__expert=3)
    assert refusal.value.exit_code == 2


def test_another_world_than_the_recipes_must_divide_too(tmp_path, monkeypatch):
    folder = planned(tmp_path / "run", pools__home__ranks=2, train__expert=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(IsthmusError, match="training on 3 ranks with"):
        steps.execute(RunFolder.open(folder), Watch(quiet=True), name=TAUGHT)
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "files.json", "plan.json", "recipe.json"]


def test_an_error_of_the_ranks_is_told_once_and_in_words(tmp_path):
    folder = planned(tmp_path / "run", pools__home__ranks=2, sft__steps=1)
    (folder / "steps" / TAUGHT).mkdir(parents=True)
    (folder / "steps" / TAUGHT / "checkpoints").touch()
    result = isthmus("run", folder, "--only", TAUGHT)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0 and "a file is in the way" in result.stderr


def test_the_error_of_a_rank_is_raised_here_with_its_class(tmp_path):
    folder = planned(tmp_path / "run")
    recipe = folder / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"steps": 24', '"steps": 25'))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(DamagedFile, match="does not match its hash"):
        run_ranks("plan", folder, {}, 2, tmp_path / "logs")
    with pytest.raises(IsthmusError, match="is not a run folder"):
        run_ranks("plan", tmp_path, {}, 2, tmp_path / "logs")
    with pytest.raises(RanksFailed, match=r"(?s)rank . stopped: ModuleNotFoundError.*logs"):
        run_ranks("nowhere", planned(tmp_path / "other"), {}, 2, tmp_path / "logs")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.skipif(not hasattr(local.LaunchConfig, "shutdown_timeout"), reason="torch 2.11 keeps to its 30 s")
def test_ranks_that_are_asked_to_leave_get_as_long_as_a_large_checkpoint_takes(tmp_path, monkeypatch):
    """torch's agent kills after 30 s what is still saving, where nothing else is said."""
    given = []

    def launched(config, _program):
        given.append(config.shutdown_timeout)
        return lambda *_words: None

    monkeypatch.setattr(local, "elastic_launch", launched)
    run_ranks("steps", tmp_path, {}, 2, tmp_path / "logs")
    assert given == [local.LEAVE_S] and local.LEAVE_S >= 3600
    monkeypatch.setenv(local.LEAVE, "45")
    run_ranks("steps", tmp_path, {}, 2, tmp_path / "logs")
    assert given[1:] == [45], "what the user says counts"
