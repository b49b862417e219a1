"""Processes on nodes of a cluster: what a recipe says of them, and the child that stands for them, with a Ray of
threads in the place of the real one, which `tests/faults/test_ray.py` has."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError, RanksFailed
from isthmus.launch.beats import create_beat, read_beat
from isthmus.launch.pool_ranks import run_on
from isthmus.nodes import HERE, PARENT, OnNodes, launcher_of
from isthmus.nodes.__main__ import LOST
from isthmus.nodes.cluster import Node, Want, placed, problems, wants
from isthmus.pools import ON_POOL, get_pool
from isthmus.recipe.read import load_recipe
from isthmus.recipe.section import RecipeError
from tests.support.ranks_recipe import RECIPE

FAKE = Path(__file__).parents[1] / "support" / "fake_ray"
ROOT = Path(__file__).parents[2]
ON_RAY = RECIPE.replace(
    '[pools.home]\nchip = "cpu"\nthreads = 1\n',
    """[cluster]
wait_s = 1.0

[pools.home]
chip = "cpu"
threads = 1
count = 2
ray = { labels = { vendor = "one" }, env = { SAID = "so" } }
""",
)
NODES = [
    {"name": "a", "labels": {"vendor": "one"}, "resources": {"CPU": 1}},
    {"name": "b", "labels": {"vendor": "one"}, "resources": {"CPU": 1}},
    {"name": "c", "labels": {"vendor": "two"}, "resources": {"CPU": 8}},
]


def recipe_of(folder: Path, text: str = ON_RAY, *overrides: str):
    file = folder / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


@pytest.fixture
def home(tmp_path):
    return get_pool(recipe_of(tmp_path), "home")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder that tells of lost nodes; what the child asked of Ray is in `calls`."""
    lost = tmp_path / "lost"
    lost.mkdir()
    monkeypatch.setenv("FAKE_NODES", json.dumps(NODES))
    monkeypatch.setenv("FAKE_LOST", str(lost))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), str(ROOT / "src")]))
    return lost


def started(launcher: OnNodes, program: str, *words: str, **options) -> subprocess.Popen[str]:
    command = launcher.command(["-c", program, *words], options.pop("variables", ()))
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)


# ---- the recipe


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[cluster]\nwait_s = 1.0\n", "", "the recipe no cluster"),
        ('ray = { labels = { vendor = "one" }, env = { SAID = "so" } }', "", "none is"),
        ("count = 2", "rehearsed = true", "rehearsed = true says otherwise"),
        ("count = 2", 'engines = ["http://127.0.0.1:1"]', "engines = [...] says otherwise"),
        ('vendor = "one"', 'vendor = "in(one)"', "is no label"),
        ('SAID = "so"', '"NO SUCH" = "so"', "no name of a variable"),
        ("ray = {", "ray = { resources = { CPU = 0 },", "resources"),
    ],
)
def test_a_recipe_that_says_two_things_of_its_nodes_is_refused(tmp_path, old, new, said):
    assert old in ON_RAY
    with pytest.raises(RecipeError, match=said.replace("[", r"\[").replace("(", r"\(")):
        recipe_of(tmp_path, ON_RAY.replace(old, new))


def test_a_pool_on_nodes_is_here_for_a_process_on_one_of_them(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    assert get_pool(recipe, "home").nodes is not None
    monkeypatch.setenv(ON_POOL, "other")
    assert get_pool(recipe, "home").nodes is not None
    monkeypatch.setenv(ON_POOL, "home")
    assert get_pool(recipe, "home").nodes is None


def test_a_process_of_a_pool_without_nodes_is_a_child_as_ever(tmp_path):
    pool = get_pool(recipe_of(tmp_path, RECIPE), "home")
    assert launcher_of(pool, tmp_path, "x") is HERE
    assert HERE.command(["-m", "this", PARENT]) == [sys.executable, "-m", "this", str(os.getpid())]


# ---- what there is room for


def node(name: str, vendor: str, **total: float) -> Node:
    return Node(name, f"host-{name}", {"vendor": vendor}, total, total)


def want(count: int, vendor: str, pool, **resources: float) -> Want:
    return Want(pool, "ranks", count, {"vendor": vendor}, resources)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 9), max_size=5), each=st.integers(1, 4), count=st.integers(1, 12))
def test_as_many_processes_find_a_place_as_the_nodes_hold(sizes, each, count):
    """Of one kind, a node holds size // each: counted here without placing any."""
    nodes = [node(str(number), "one", CPU=size) for number, size in enumerate(sizes)]
    (taken,) = placed([Want(None, "ranks", count, {"vendor": "one"}, {"CPU": each})], nodes)  # pyright: ignore
    assert len(taken) == min(count, sum(size // each for size in sizes))
    assert all(taken.count(str(number)) <= size // each for number, size in enumerate(sizes))


def test_pools_that_share_nodes_take_from_each_other(home):
    nodes = [node("a", "one", CPU=3), node("b", "two", CPU=9)]
    first, second = placed([want(2, "one", home, CPU=1), want(2, "one", home, CPU=1)], nodes)
    assert (first, second) == (["a", "a"], ["a"])


def test_a_label_that_no_node_has_is_told_with_those_that_they_have(home):
    nodes = [node("a", "two", CPU=3), node("b", "three", CPU=1)]
    (said,) = problems([want(2, "one", home, CPU=1)], nodes)
    assert "'home'" in said and "vendor = one" in said and "vendor = two" in said and "vendor = three" in said
    (said,) = problems([want(4, "two", home, CPU=1)], nodes)
    assert "room for 3" in said and "host-a: 3 CPU" in said
    assert problems([want(3, "two", home, CPU=1)], nodes) == []


def test_a_recipe_wants_one_chip_for_each_process_if_it_does_not_say_more(tmp_path):
    (one,) = wants(recipe_of(tmp_path))
    assert (one.count, one.resources, one.labels) == (2, {"CPU": 1.0}, {"vendor": "one"})
    (one,) = wants(recipe_of(tmp_path, ON_RAY, "pools.home.ray.resources={CPU=4, disk=1}"))
    assert one.resources == {"CPU": 4, "disk": 1}


def test_the_command_without_ray_says_how_to_get_it(tmp_path):
    recipe_of(tmp_path)
    code = "import sys; sys.modules['ray'] = None; from isthmus.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "cluster", str(tmp_path / "recipe.toml")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "isthmus[ray]" in done.stderr, done.stderr


# ---- the child that stands for processes on nodes


@pytest.mark.parametrize("code", [0, 3])
def test_it_prints_what_is_printed_there_and_ends_with_its_code(cluster, home, tmp_path, code):
    program = "import os, sys; print(os.environ['SAID'], os.environ['ISTHMUS_ON_POOL']); sys.exit(int(sys.argv[1]))"
    process = started(OnNodes(home, tmp_path, "x"), f"{program}", str(code))
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "so home\n"), errors
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call["what"] for call in calls] == ["init", "actor", "removed", "shutdown"]
    assert calls[1]["num_cpus"] == 1


def test_it_ends_by_the_signal_that_ended_its_process(cluster, home, tmp_path):
    process = started(OnNodes(home, tmp_path, "x"), "import os; os.kill(os.getpid(), 9)")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_it_passes_signals_and_the_end_of_its_input_on(cluster, home, tmp_path):
    program = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); "
        "sys.stdin.read(); print('over')"
    )
    process = started(OnNodes(home, tmp_path, "x", follows_input=True), program)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 7

    process = started(OnNodes(home, tmp_path, "x", follows_input=True), program)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "over\n")


def test_a_process_ends_when_the_child_that_stands_for_it_is_killed(cluster, home, tmp_path):
    """The kernel does it here; where the keeper is on another machine, Ray ends it there and the kernel the process."""
    file = tmp_path / "pid"
    program = (
        "import ctypes, os, pathlib, sys, time; ctypes.CDLL(None).prctl(1, 9); "
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); print('up', flush=True); time.sleep(60)"
    )
    process = started(OnNodes(home, tmp_path, "x"), program, str(file))
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{file.read_text()}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_secret_is_not_on_the_command_line_and_arrives(cluster, home, tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_ADMIN_KEY", "s3cret")
    monkeypatch.setenv("GIVEN", "yes")
    monkeypatch.setenv("NOT_GIVEN", "no")
    launcher = OnNodes(home, tmp_path, "x")
    assert "s3cret" not in " ".join(launcher.command(["-c", ""]))
    program = "import os; print(*(os.environ.get(name) for name in ('ISTHMUS_ADMIN_KEY', 'GIVEN', 'RAY_ADDRESS')))"
    out, errors = started(launcher, program, variables=["GIVEN"]).communicate(timeout=60)
    assert out == "s3cret yes 127.0.0.1:6379\n", errors


def test_a_node_that_does_not_see_the_run_folder_is_refused(cluster, home, tmp_path):
    """The keeper here sees all that the child sees; a folder that is taken away in between stands for another mount."""
    blind = cluster.parent / "sitecustomize.py"
    blind.write_text("import pathlib\npathlib.Path.is_file = lambda self: False\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blind.parent), os.environ["PYTHONPATH"]])}
    process = started(OnNodes(home, tmp_path, "x"), "print('ran')", env=environment)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and not out
    assert f"does not see the folder {tmp_path}" in errors and "127.0.0.1" in errors


def test_a_cluster_without_room_is_told_with_what_is_wanted(cluster, home, tmp_path):
    process = started(OnNodes(home, tmp_path, "x", count=3), "print('ran')")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and not out
    assert "3 processes of the pool 'home', 1 CPU each, on nodes with vendor = one" in errors


def test_an_address_where_nothing_is_is_told_with_rays_words(cluster, tmp_path):
    pool = get_pool(recipe_of(tmp_path, ON_RAY, "cluster.address=nowhere:1"), "home")
    _, errors = (process := started(OnNodes(pool, tmp_path, "x"), "")).communicate(timeout=60)
    assert process.returncode == 2 and "Could not find any running Ray instance" in errors and "nowhere:1" in errors


def test_beats_arrive_with_the_time_that_they_have_here(cluster, home, tmp_path, monkeypatch):
    """The clock of a node is another one; a beat that is five seconds old is that old here."""
    folder = tmp_path / "beats"
    folder.mkdir()
    monkeypatch.setenv("ISTHMUS_BEATS", str(folder))
    create_beat(tmp_path / "empty")
    layout = struct.Struct("<dqqq96s")
    assert layout.size == (tmp_path / "empty").stat().st_size
    program = (
        "import os, pathlib, struct, time; folder = pathlib.Path(os.environ['ISTHMUS_BEATS']); "
        "beat = struct.pack('<dqqq96s', time.monotonic() - 5, 7, 1, 2, b'update'); "
        "(folder / f'0-{os.getpid()}').write_bytes(beat); print('up', flush=True); time.sleep(1.5)"
    )
    process = started(OnNodes(home, tmp_path, "x"), program)
    process.communicate(timeout=60)
    assert not (folder / "0").exists()
    beat = read_beat(folder / f"0-{process.pid}")
    assert (beat.step, beat.beats, beat.collectives, beat.section) == (7, 1, 2, "update")
    assert 5 < time.monotonic() - beat.time < 60


# ---- ranks


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def on_nodes(home, run: Path, program: str, monkeypatch, ranks: int = 2) -> None:
    """`run_on`, with a program in the place of a stage."""
    original = OnNodes.command

    def command(self, words, variables=(), *, again=False):
        return original(self, ["-c", program, *words[2:]], variables, again=again)

    monkeypatch.setattr(OnNodes, "command", command)
    run_on(home, "steps", run, {"name": "one"}, ranks, run / "ranks")


def test_ranks_are_told_their_places_and_meet(cluster, home, run, monkeypatch):
    program = (
        "import os, sys, pathlib; import torch, torch.distributed as dist; dist.init_process_group('gloo'); "
        "total = torch.ones(1); dist.all_reduce(total); "
        "told = [os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')]; "
        "pathlib.Path(sys.argv[4], f'told-{told[0]}').write_text(' '.join([*told, str(int(total))])); "
        "dist.destroy_process_group()"
    )
    on_nodes(home, run, program, monkeypatch)
    assert [(run / f"told-{rank}").read_text() for rank in (0, 1)] == ["0 2 0 1 2", "1 2 0 1 2"]
    assert not (run / "ranks").exists()


def test_a_rank_that_is_killed_is_named_and_the_others_end(cluster, home, run, monkeypatch):
    program = (
        "import os, sys, time; print('last words', file=sys.stderr, flush=True); "
        "os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)"
    )
    with pytest.raises(RanksFailed, match=r"rank 1 stopped: killed by signal 9 \(SIGKILL\)(?s:.*)last words") as found:
        on_nodes(home, run, program, monkeypatch)
    assert found.value.rank == 1


@pytest.mark.parametrize("at_the_start", [False, True])
def test_the_loss_of_a_node_is_told_and_the_others_end(cluster, home, run, monkeypatch, at_the_start):
    if at_the_start:
        monkeypatch.setenv("FAKE_FAINT", "b")
    program = (
        "import os, pathlib, sys, time; "
        f"pathlib.Path({str(cluster)!r}, 'b').touch() if os.environ['RANK'] == '1' else None; time.sleep(60)"
    )
    with pytest.raises(RanksFailed, match=r"rank 1 stopped: the node 127.0.0.1 of the pool 'home' is gone"):
        on_nodes(home, run, program, monkeypatch)
    assert json.loads((run / "ranks" / "ends.json").read_text())[-1]["code"] in (LOST, -signal.SIGTERM)


def test_an_error_of_the_user_on_a_node_is_the_error_here(cluster, home, run, monkeypatch):
    program = (
        "import json, os, pathlib, sys; "
        "report = {'time': 1.0, 'error': 'IsthmusError', 'message': 'write it otherwise'}; "
        "pathlib.Path(sys.argv[2], 'rank-0.json').write_text(json.dumps(report)); sys.exit(2)"
    )
    with pytest.raises(IsthmusError, match="write it otherwise") as found:
        on_nodes(home, run, program, monkeypatch, ranks=1)
    assert not isinstance(found.value, RanksFailed)


def test_ranks_that_were_asked_to_stop_stop_the_command(cluster, home, run, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        on_nodes(home, run, "raise SystemExit(130)", monkeypatch)
