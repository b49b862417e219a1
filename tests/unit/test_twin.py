"""Twins: what is recorded of a plain training loop, and how two records are told apart."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from isthmus.cli import cli
from isthmus.errors import IsthmusError
from isthmus.supervise.twins import TwinVerdict, compare, read_twin
from isthmus.twin import rows_digest
from tests.support import twin_script

SCRIPT = Path(twin_script.__file__)
ROOT = SCRIPT.parents[2]
VARIANTS = ("plain", "again", "no-dropout", "accumulated", "weights", "data-order", "data-position", "other-data")
LATER_VARIANTS = ("learning-rate", "random", "precision", "module")
FORKS = """
import os, sys
from pathlib import Path
import torch
from isthmus import twin
from tests.support.twin_script import train
torch.set_num_threads(1)
for name in sys.argv[2:]:
    if os.fork() == 0:
        recorder = twin.start(Path(sys.argv[1]) / name, state_every=4)
        train(name)
        recorder.end()
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    found = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=variables, check=False, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of each variant, by its name."""
    folder = tmp_path_factory.mktemp("twins")
    python("-c", FORKS, str(folder), *VARIANTS, *LATER_VARIANTS)
    return folder


def held(recorded: Path, name: str, against: str = "plain", band: str = "standard") -> TwinVerdict:
    return compare(read_twin(recorded / against), read_twin(recorded / name), band)


def test_the_figures_are_those_of_the_loop_computed_by_hand(recorded: Path):
    """The same first step without a recorder: its loss, and the norm that clip_grad_norm_ gives."""
    model, tokens = twin_script.model_of("no-dropout"), twin_script.batches("no-dropout")[0]
    loss = twin_script.loss_of(model, tokens, "no-dropout")
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    step = read_twin(recorded / "no-dropout").steps[1]
    assert step.loss == pytest.approx(loss.item(), rel=1e-6)
    assert step.norm == pytest.approx(norm, rel=1e-5)
    squares = sum(float(one.grad.square().sum()) for one in model[1].parameters() if one.grad is not None)
    assert step.squares["1"] == pytest.approx(squares, rel=1e-5)


def test_modules_have_the_names_that_the_outermost_model_gives_them(tmp_path: Path):
    """A part that holds nearly all parameters is watched too, and does not rename them."""
    code = (
        "import sys, torch; from torch import nn; from isthmus import twin; twin.start(sys.argv[1])\n"
        "model = nn.Sequential(nn.LayerNorm(2), nn.ModuleDict({'body': nn.Sequential(nn.Linear(2, 99))})['body'])\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "model(torch.ones(1, 2)).sum().backward(); optimizer.step()"
    )
    python("-c", code, str(tmp_path))
    assert set(read_twin(tmp_path).steps[1].squares) == {"0", "1.0"}


def test_the_same_training_agrees_bit_for_bit(recorded: Path):
    verdict = held(recorded, "again", band="same")
    assert verdict.agree and verdict.narrowest == "same" and verdict.steps == twin_script.STEPS
    assert set(verdict.largest.values()) == {0.0}


def test_accumulation_agrees_within_the_standard_band_and_has_the_same_batches(recorded: Path):
    """Without dropout two halves of a batch teach what the whole does, up to the last bits."""
    verdict = held(recorded, "accumulated", against="no-dropout")
    steps = [read_twin(recorded / name).steps for name in ("accumulated", "no-dropout")]
    assert [step.batch for step in steps[0].values()] == [step.batch for step in steps[1].values()]
    assert verdict.parting is None or verdict.parting.kind not in ("data", "data order", "weights")


@pytest.mark.parametrize(
    ("name", "step", "kind", "module"),
    [
        ("weights", 1, "weights", "0"),
        ("data-order", 4, "data order", None),
        ("data-position", 4, "position in the data", None),
        ("other-data", 3, "data", None),
        ("learning-rate", 5, "learning rate", None),
        ("random", 4, "random state", None),
        ("module", 1, "one module", "4"),
    ],
)
def test_what_parts_two_trainings_is_named(recorded: Path, name: str, step: int, kind: str, module: str | None):
    parting = held(recorded, name).parting
    assert parting is not None
    assert (parting.step, parting.kind) == (step, kind)
    if kind != "weights":
        assert parting.module == module


def test_precision_is_named_where_it_is_what_parts_them(recorded: Path):
    verdict = held(recorded, "precision", band="strict")
    assert verdict.parting is not None and verdict.parting.kind in ("precision", "one module")
    assert any("bfloat16" in note for note in verdict.notes)


def test_state_is_recorded_before_the_first_step_and_as_often_as_asked(recorded: Path):
    lines = [json.loads(line) for line in next((recorded / "plain").glob("*.jsonl")).read_text().splitlines()]
    states = [line for line in lines if line["kind"] == "state"]
    assert [(line["count"], line["when"]) for line in states] == [(0, "before"), (4, "after"), (8, "after")]
    assert set(states[-1]["squares"]) == {"parameters", "exp_avg", "exp_avg_sq"}
    (embedding,) = twin_script.model_of("plain")[0].parameters()
    assert states[0]["squares"]["parameters"]["0"] == pytest.approx(embedding.square().sum().item(), rel=1e-5)


@pytest.mark.long
def test_a_run_that_goes_on_is_its_twin_and_one_that_lost_its_moments_is_not(recorded: Path, tmp_path: Path):
    for name in ("plain", "moments"):
        checkpoint, out = tmp_path / f"{name}.pt", tmp_path / name
        for stop in ("5", str(twin_script.STEPS)):
            start = ["-m", "isthmus", "twin", "record", "--out", str(out), "--", "python"]
            python(*start, str(SCRIPT), name, str(checkpoint), stop)
            if name == "moments" and stop == "5":
                next(out.iterdir()).unlink()
    assert compare(read_twin(recorded / "plain"), read_twin(tmp_path / "plain"), "same").agree
    parting = compare(read_twin(recorded / "plain"), read_twin(tmp_path / "moments"), "standard").parting
    assert parting is not None and parting.kind == "optimiser state" and parting.step == 6


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_ranks_agree_with_one(recorded: Path, tmp_path: Path, name: str):
    """Replicated and sharded: the ranks' shares add up to the gradient of one process with the whole batch."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), name]
    python("-m", "isthmus", "twin", "record", "--out", str(tmp_path), "--", "python", *torchrun)
    one, two = read_twin(recorded / "no-dropout"), read_twin(tmp_path)
    assert two.world == 2 and [step.batch for step in one.steps.values()] == [step.batch for step in two.steps.values()]
    assert two.steps[1].squares == pytest.approx(one.steps[1].squares, rel=1e-4)
    assert two.steps[1].loss == pytest.approx(one.steps[1].loss, rel=1e-5)
    next(tmp_path.glob("rank-00001-*")).unlink()
    with pytest.raises(IsthmusError, match=r"lacks the files of ranks \[1\] of 2"):
        read_twin(tmp_path)


def test_rows_have_one_digest_in_any_order_width_and_number_of_parts():
    rows = torch.arange(24).reshape(4, 6)
    whole, count = rows_digest({"input_ids": rows, "labels": rows + 1})
    parts = [rows_digest(([part.int()], {"labels": part + 1}))[0] for part in (rows[2:], rows[:2])]
    assert count == 4 and whole == sum(parts) % (1 << 62)
    assert whole != rows_digest({"input_ids": rows, "labels": rows})[0]
    assert whole != rows_digest({"input_ids": rows, "labels": (rows + 1).flip(0)})[0]


def test_the_command_says_where_twins_part_and_ends_with_1(recorded: Path):
    found = CliRunner().invoke(cli, ["twin", "compare", str(recorded / "plain"), str(recorded / "learning-rate")])
    assert found.exit_code == 1
    assert "part at step 5: learning rate" in found.output and "0.0033" in found.output


def test_bad_records_are_explained(recorded: Path, tmp_path: Path):
    with pytest.raises(IsthmusError, match="has no record of a twin"):
        read_twin(tmp_path)
    lines = next((recorded / "plain").glob("*.jsonl")).read_text().splitlines()
    damaged = tmp_path / "rank-00000-0000.jsonl"
    damaged.write_text("\n".join([lines[0], "{", *lines[1:]]))
    with pytest.raises(IsthmusError, match="line 2, is damaged"):
        read_twin(tmp_path)
    damaged.write_text("\n".join([*lines, lines[-1][:40]]))
    assert len(read_twin(tmp_path).steps) == twin_script.STEPS
    damaged.write_text("\n".join([*lines, lines[-1][:40], ""]))
    with pytest.raises(IsthmusError, match=f"line {len(lines) + 1}, is damaged"):
        read_twin(tmp_path)
    damaged.write_text("\n".join(lines[1:]))
    with pytest.raises(IsthmusError, match="no header"):
        read_twin(tmp_path)
    with pytest.raises(IsthmusError, match="there is no band"):
        held(recorded, "again", band="wide")
