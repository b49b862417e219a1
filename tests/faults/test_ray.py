"""Real Ray: a head and nodes with labels of two vendors, on this machine, and one of them killed with -9 in the middle
of a step of reinforcement learning. `tests/unit/test_nodes.py` has all that needs no Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.recipe.read import load_recipe
from isthmus.records import Placement, PlanRecord, RlRecord, incidents
from isthmus.run import RunFolder
from tests.support.flow_recipe import REINFORCED, ROOT, TAUGHT
from tests.support.ranks_recipe import RECIPE

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'isthmus[ray]'", allow_module_level=True)

pytestmark = pytest.mark.long
STEPS = 8
ON_RAY = (
    RECIPE.replace(
        'chip = "cpu"\nthreads = 1\n',
        """chip = "cpu"
threads = 1
ray = { labels = { vendor = "one" } }

[pools.away]
chip = "cpu"
threads = 1
count = 2
ray = { labels = { vendor = "two" } }

[cluster]
wait_s = 120.0
""",
    )
    .replace('rollout = ["home"]', 'rollout = ["away"]')
    .replace("[handoff]", "[step.loss]\nkl_weight = 0.01\n\n[handoff]")
    .replace("steps = 2\n", f"steps = {STEPS}\ncheckpoint_every = 2\n")
)
CLUSTER = """
import json, sys, time
from ray.cluster_utils import Cluster
cluster = Cluster()
cluster.add_node(num_cpus=0, include_dashboard=False)
raylets = {}
for name, vendor, cpus in (word.split(":") for word in sys.argv[1:]):
    node = cluster.add_node(num_cpus=int(cpus), labels={"vendor": vendor})
    raylets[name] = node.all_processes["raylet"][0].process.pid
print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
sys.stdin.read()
"""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_health_check_timeout_ms": "100000",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
}


def started_cluster(*nodes: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Nodes as `name:vendor:cpus` beside a head that takes no work; what they are. It ends with its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, *nodes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


@pytest.fixture
def cluster() -> Iterator[dict[str, Any]]:
    process, told = started_cluster("one:one:1", "spare:one:1", "two:two:1", "three:two:1")
    yield told
    process.communicate(timeout=60)


def isthmus(address: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "isthmus", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "RAY_ADDRESS": address, "COLUMNS": "200"},
    )


def prepared(folder: Path, address: str) -> RunFolder:
    """A run that lacks reinforcement learning alone."""
    file = folder.with_suffix(".toml")
    file.write_text(ON_RAY, encoding="utf-8")
    run = RunFolder.create(folder, load_recipe(file))
    pools = {"train": "home", "rollout": "away", "serve": "home"}
    placements = [Placement(stage=stage, pool=pool, reason="so") for stage, pool in pools.items()]  # pyright: ignore
    record = PlanRecord(
        recipe_sha256=run.recipe.digest(), started=0, ended=0, placements=placements, rejected=[], estimate={}
    )
    run.write_record("plan", record)
    _, errors = (process := isthmus(address, "run", folder, "--only", TAUGHT)).communicate(timeout=900)
    assert process.returncode == 0, errors
    return run


def node_of(run: RunFolder, raylets: dict[str, int], command: str) -> int:
    """The raylet under which a process works on the run whose command line has this word."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if command in words and any(str(run.path) in word for word in words) and "isthmus.nodes" not in words:
            parent = int(entry.name)
            while parent > 1 and parent not in raylets.values():
                parent = int((Path(f"/proc/{parent}/stat").read_text()).rpartition(")")[2].split()[1])
            if parent > 1:
                return parent
    raise AssertionError(f"no {command} under {raylets}")


def wait_for(run: RunFolder, update: int, process: subprocess.Popen[str]) -> None:
    while max((event["step"] for event in run.events(REINFORCED, "step")), default=0) < update:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def finished(run: RunFolder, process: subprocess.Popen[str]) -> tuple[RlRecord, str]:
    output, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, output + errors
    assert [event["step"] for event in run.events(REINFORCED, "step")] == list(range(1, STEPS + 1))
    return run.require_record(f"steps/{REINFORCED}/record", RlRecord, "run"), output


@pytest.mark.parametrize("whose", ["engine", "trainer"])
def test_a_node_that_is_killed_in_reinforcement_learning(tmp_path, cluster, whose):
    run = prepared(tmp_path / "run", cluster["address"])
    process = isthmus(cluster["address"], "run", run.path, "--only", REINFORCED)
    wait_for(run, 3, process)
    word = {"engine": "isthmus.engines.local", "trainer": "isthmus.launch.rank"}[whose]
    os.kill(node_of(run, cluster["raylets"], word), signal.SIGKILL)
    record, _ = finished(run, process)
    assert (record.pool, record.rollout_pool, record.steps) == ("home", "away", STEPS)
    met = incidents(run, REINFORCED)
    if whose == "engine":
        assert not met and record.resumed_from == []
        left_out = [event for event in run.events(REINFORCED, "fallback") if "left out, 1 of 2" in event["what"]]
        assert left_out
    else:
        assert [(one.signal, one.rung, one.outcome) for one in met] == [("ended", "restart", "done")]
        assert "the node" in met[0].detail and "'home' is gone" in met[0].detail
        assert record.resumed_from and record.resumed_from[0] >= 2


def test_a_cluster_without_the_label_is_refused_before_anything_runs(tmp_path, cluster):
    file = tmp_path / "recipe.toml"
    file.write_text(ON_RAY.replace('vendor = "two"', 'vendor = "nobody"'), encoding="utf-8")
    _, errors = (process := isthmus(cluster["address"], "run", file, "--run", tmp_path / "run")).communicate()
    assert process.returncode == 2 and "vendor = nobody" in errors and "vendor = one; vendor = two" in errors
    assert not (tmp_path / "run").exists()
    output, errors = (process := isthmus(cluster["address"], "cluster", file)).communicate()
    assert process.returncode == 1 and "0 of 2" in output and "vendor = nobody" in errors
