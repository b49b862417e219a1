"""A packed failure: its script needs torch alone, fails where the probe failed, and passes where it should."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from isthmus.chips import load_chips, vendor_of, vendors
from isthmus.cli import cli
from isthmus.errors import IsthmusError
from isthmus.launch.crew import Crew
from isthmus.probes.cases.packing import clashing_names, foreign_imports, runs_needed, source_of, write_archive
from isthmus.probes.cases.shrink import Frequency
from isthmus.probes.cases.surroundings import describe_machine, shown_variables, without_private
from isthmus.progress import Watch
from isthmus.tools import case
from isthmus.tools.case import Packed, execute, read_case
from tests.support import portable_work

AMPLE = 1200.0
"""Seconds, for shrinking that ends because nothing gets smaller, however busy the machine is."""
QUIET = Watch(Console(quiet=True))
COUNT = {"elements": 101, "repeats": 3, "dtypes": ["float32", "bfloat16", "float64"], "seed": 3}
BLOCKED = ("isthmus", "numpy", "pydantic", "click", "rich", "safetensors", "jinja2")
AWAY = "ascend-910b-313t"

Keep = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def tests_have_probes_of_their_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case, "PROBES", "tests.support.portable_work:")
        patch.setattr(case, "RUNS", 3)
        yield


def keep(folder: Path, name: str, arguments: dict[str, Any], ranks: int, crew: Crew | None = None, **more: Any) -> Path:
    """Call a probe of the tests and keep what came as a case, whatever came."""
    function = f"tests.support.portable_work:{name}"
    files = {key: str(folder / arguments[key]) for key in more.get("files", [])}
    with crew or Crew(ranks) as used:
        called = used.call(function, {**arguments, **files}, deadline_s=60, stall_s=1.5)
    replies = [{**vars(one), "beat": str(one.beat)} for one in called.replies]
    kept = {
        "probe": "sums",
        "title": "A sum that is wrong",
        "function": function,
        "arguments": arguments,
        "ranks": ranks,
        "device": "cpu",
        "pool": "home",
        "chip": "cpu",
        "rehearsed": False,
        "expected": "the exact sum",
        "observed": "another sum",
        "replies": replies,
        "environment": {"torch": torch.__version__},
        "log": [line for one in called.replies for line in one.log.splitlines()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure.json").write_text(json.dumps({**kept, **more}), encoding="utf-8")
    return folder


def run_alone(script: Path, blockers: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> Any:
    """Run a packed script where Isthmus and everything but torch cannot be imported."""
    blockers.mkdir(exist_ok=True)
    for name in BLOCKED:
        (blockers / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is not here')\n")
    paths = [str(blockers), str(Path(torch.__file__).parents[1])]
    command = [sys.executable, "-S", *launcher, str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=script.parent, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """A sum over three ranks that is really wrong: bf16 holds no odd integer above 256."""
    folder = keep(tmp_path_factory.mktemp("kept") / "01-sums", "count_in_bf16", COUNT, ranks=3)
    return execute(folder, QUIET, seconds=AMPLE)


def test_a_wrong_sum_is_shrunk_to_what_it_takes(packed: Packed):
    arguments = packed.call.arguments
    total = arguments["elements"] * packed.call.ranks
    assert packed.call.ranks == 3 and arguments["dtypes"] == ["bfloat16"] and arguments["repeats"] == 1
    assert arguments["elements"] < 101 and torch.tensor(float(total)).bfloat16().item() != total
    assert packed.frequency is not None and packed.frequency.failures == packed.frequency.runs > 0
    assert packed.exit_code == 1


def test_the_archive_holds_the_folder(packed: Packed):
    names = {"reproduce.py", "README.md", "expected.json", "environment.txt", "log.txt"}
    assert {path.name for path in packed.folder.iterdir()} == names
    with tarfile.open(packed.archive) as archive:
        assert sorted(archive.getnames()) == sorted(f"{packed.folder.name}/{name}" for name in names)
        assert {(entry.mtime, entry.uid, entry.uname) for entry in archive} == {(0, 0, "")}


def test_the_script_contains_the_probes_file_as_it_is(packed: Packed):
    source = Path(portable_work.__file__).read_text(encoding="utf-8")
    assert source.replace("from __future__ import annotations\n", "").strip() in (
        packed.folder / "reproduce.py"
    ).read_text(encoding="utf-8")


def test_the_script_fails_with_torch_alone_and_passes_where_the_sum_is_exact(packed: Packed, tmp_path: Path):
    script = packed.folder / "reproduce.py"
    blocked = run_alone(script, tmp_path / "block", launcher=("-c", "import isthmus"))
    assert "isthmus is not here" in blocked.stderr
    done = run_alone(script, tmp_path / "block")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "REPRODUCED" in done.stdout and "expected: the exact sum" in done.stdout and "instead of" in done.stdout
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "torch.py").write_text("raise ModuleNotFoundError('no torch')\n")
    assert run_alone(script, tmp_path / "bare").returncode == 2
    alone = run_alone(script, tmp_path / "block", "--ranks", "1", "--runs", "1")
    assert alone.returncode == 0 and "HEALTHY" in alone.stdout, alone.stdout + alone.stderr


def test_the_script_takes_its_place_from_torchrun(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One rank of one, as torchrun would start it: a sum that is exact."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    done = run_alone(packed.folder / "reproduce.py", tmp_path / "block")
    assert done.returncode == 0 and "on 1 ranks" in done.stdout and "HEALTHY" in done.stdout, done.stderr


def test_the_readme_tells_what_fails_how_often_and_what_was_done(packed: Packed):
    text = (packed.folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# A sum that is wrong")
    for part in ("the exact sum", "another sum", "fails in 3 of 3 runs", "needs torch and nothing", "exit code 1"):
        assert part in text
    assert '| `dtypes` | `["float32", "bfloat16", "float64"]` | `["bfloat16"]` |' in text
    expected = json.loads((packed.folder / "expected.json").read_text(encoding="utf-8"))
    assert expected["ranks"] == 3 and expected["manner"]["state"] == "wrong"


@pytest.mark.long
def test_a_list_of_operators_becomes_the_one_that_fails(tmp_path: Path):
    calls = [{"operator": name, "shapes": [[32, 96], [96, 64]]} for name in ("good", "bad", "other")]
    folder = keep(tmp_path / "02-products", "products", {"calls": calls, "seed": 1}, ranks=2)
    found = execute(folder, QUIET, seconds=AMPLE)
    small = {"calls": [{"operator": "bad", "shapes": [[1, 48], [48, 3]]}], "seed": 1}
    assert found.call.arguments == small and found.call.ranks == 1 and found.exit_code == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param("crash", "killed by signal 9", marks=pytest.mark.long),
        ("raise", "RuntimeError"),
        pytest.param("hang", "a hang", marks=pytest.mark.long),
    ],
)
def test_crashes_errors_and_hangs_shrink_to_the_ranks_and_steps_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
):
    for name, value in {"STALL_S": 5.0, "HANG_S": 3.0, "RUNS": 1}.items():
        monkeypatch.setattr(case, name, value)
    folder = keep(tmp_path / how, "end", {"how": how, "who": 1, "steps": 9}, ranks=3)
    found = execute(folder, QUIET, seconds=AMPLE)
    assert found.call.ranks == 2 and 4 <= found.call.arguments["steps"] < 9
    assert found.exit_code == 1 and said in (found.folder / "README.md").read_text(encoding="utf-8")


def test_what_does_not_fail_here_is_packed_as_it_was_found_and_says_so(tmp_path: Path):
    wrong = [{"rank": rank, "state": "done", "value": {"failed": True}, "error": ""} for rank in range(2)]
    folder = keep(tmp_path / "03", "under_the_rules", {"steps": 8}, ranks=2, replies=wrong)
    found = execute(folder, QUIET, seconds=AMPLE)
    assert found.call.arguments == {"steps": 8} and found.call.ranks == 2 and found.exit_code == 0
    assert (found.folder / "README.md").read_text(encoding="utf-8").startswith("> **It did not fail again")


def test_a_rehearsed_failure_says_so_first_and_its_script_passes(tmp_path: Path):
    """The rehearsed chip refuses float64; the script cannot contain that rule."""
    arguments = {"elements": 4, "repeats": 2, "dtypes": ["float32", "float64"]}
    chip = {"rehearsed": True, "chip": AWAY, "pool": "away"}
    folder = keep(tmp_path / "04", "count_in_bf16", arguments, 2, Crew(2, chip=AWAY), **chip)
    found = execute(folder, QUIET, seconds=AMPLE)
    assert found.call.arguments["dtypes"] == ["float64"] and found.call.ranks == 1 and found.exit_code == 0
    text = (found.folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("> **REHEARSAL: the rules of ascend-910b-313t") and "needs torch and nothing else" in text
    assert "passes on the CPU without the rehearsal" in text


def test_a_planted_fault_is_described_and_not_contained(tmp_path: Path):
    fault = "wrong-sum@rank=1,rate=1.0,size=0.5"
    wrong = [{"rank": rank, "state": "done", "value": {"failed": True}, "error": ""} for rank in range(2)]
    folder = keep(tmp_path / "05", "under_the_rules", {"steps": 8}, ranks=2, replies=wrong, planted=[fault])
    found = execute(folder, QUIET, seconds=AMPLE)
    first = (found.folder / "README.md").read_text(encoding="utf-8").splitlines()[0]
    assert "REHEARSAL" in first and fault in first and "passes" in first
    printed = (found.folder / "log.txt").read_text(encoding="utf-8").partition("printed here:\n")[2]
    assert found.exit_code == 0 and printed.startswith("REHEARSAL") and fault in printed and "HEALTHY" in printed


def test_inputs_in_a_file_go_along(tmp_path: Path):
    folder = tmp_path / "06"
    folder.mkdir()
    torch.save({"x": torch.tensor([2.0**24, 1.0, 1.0])}, folder / "inputs.pt")
    keep(folder, "replayed", {"inputs": "inputs.pt", "times": 4}, ranks=1, files=["inputs"])
    found = execute(folder, QUIET, seconds=AMPLE, out=tmp_path / "elsewhere")
    assert found.call.arguments == {"inputs": "inputs.pt", "times": 1} and found.exit_code == 1
    assert (tmp_path / "elsewhere" / "inputs.pt").read_bytes() == (folder / "inputs.pt").read_bytes()


def test_a_figure_that_does_not_judge_itself_is_packed_and_undecided(tmp_path: Path):
    found = execute(keep(tmp_path / "07", "measured", {"size": 8}, ranks=1), QUIET, seconds=AMPLE)
    assert found.frequency is None and found.exit_code == 2 and found.call.arguments == {"size": 8}


def test_a_device_that_is_not_here_leaves_the_case_as_it_was(tmp_path: Path):
    chip = {"device": "npu", "chip": AWAY, "pool": "away"}
    folder = keep(tmp_path / "08", "count_in_bf16", COUNT, ranks=3, **chip)
    found = execute(folder, QUIET, seconds=AMPLE)
    assert found.frequency is None and found.exit_code is None and found.call.arguments == COUNT
    assert "needs torch and torch_npu" in (found.folder / "README.md").read_text(encoding="utf-8")
    script = (found.folder / "reproduce.py").read_text(encoding="utf-8")
    for name, value in vendor_of(AWAY).environment.items():
        assert f"os.environ.setdefault('{name}', '{value}')" in script.partition("import torch")[0]
    done = run_alone(found.folder / "reproduce.py", tmp_path / "block")
    assert done.returncode == 2 and "torch_npu cannot be loaded" in done.stdout, done.stderr
    on_the_cpu = run_alone(found.folder / "reproduce.py", tmp_path / "block", "--device", "cpu", "--runs", "1")
    assert on_the_cpu.returncode == 1 and "on 3 ranks of cpu" in on_the_cpu.stdout, on_the_cpu.stderr


def test_no_shrink_and_ranks_are_honoured(tmp_path: Path):
    folder = keep(tmp_path / "09", "count_in_bf16", COUNT, ranks=3)
    found = execute(folder, QUIET, seconds=AMPLE, no_shrink=True, ranks=5)
    assert found.call.arguments == COUNT and found.call.ranks == 5 and found.exit_code == 1


def test_equal_folders_give_equal_archives(tmp_path: Path):
    for name in ("a", "b"):
        folder = tmp_path / name / "case"
        folder.mkdir(parents=True)
        (folder / "reproduce.py").write_text("pass\n")
        (folder / "log.txt").write_text("x\n")
        os.utime(folder / "log.txt", (len(name), 10 if name == "a" else 10**9))
    assert write_archive(tmp_path / "a" / "case").read_bytes() == write_archive(tmp_path / "b" / "case").read_bytes()


def test_the_failure_is_found_in_a_run_folder_and_asked_for_where_there_are_several(tmp_path: Path):
    with pytest.raises(IsthmusError, match="isthmus inspect"):
        read_case(tmp_path)
    with pytest.raises(IsthmusError, match="does not exist"):
        read_case(tmp_path / "nothing")
    one = keep(tmp_path / "qualify" / "home" / "failures" / "01-sums", "measured", {"size": 1}, ranks=1)
    places = (tmp_path, tmp_path / "qualify", tmp_path / "qualify" / "home", one, one / "failure.json")
    assert {read_case(place)[0] for place in places} == {one}
    other = keep(tmp_path / "qualify" / "home" / "failures" / "02-sums", "measured", {"size": 1}, ranks=1)
    with pytest.raises(IsthmusError, match="2 failures") as told:
        read_case(tmp_path)
    assert str(one) in str(told.value) and str(other) in str(told.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"function": "os:system"}, "can be packed"),
        ({"function": "tests.support.portable_work:nothing"}, "no function"),
        ({"files": ["size"]}, "`size` must name a file beside it, not 1"),
        ({"files": ["size"], "arguments": {"size": "../failure.json"}}, "must name a file"),
        ({"files": ["size"], "arguments": {"size": "inputs.pt"}}, "inputs.pt: it is not there"),
        ({"ranks": "many"}, "`ranks` must be a whole number, not 'many'"),
        ({"ranks": 0}, "`ranks` is 0"),
        ({"title": None, "log": "x"}, "`title` must be a text, not None (and 1 more such)"),
        ({"arguments": []}, "`arguments` must be an object, not []"),
        ({"rehearsed": "perhaps"}, "`rehearsed` must be true or false, not 'perhaps'"),
        ({"verdict": "fit"}, "it has `verdict`, which no kept failure has"),
        ({"replies": [{"rank": 0}]}, "a reply lacks `state`"),
        ({"planted": ["crush@rank=1"]}, "unknown kind of fault 'crush'"),
        ({"chip": "nothing"}, "unknown chip"),
    ],
)
def test_a_case_that_cannot_be_packed_is_refused(tmp_path: Path, change: dict, said: str):
    folder = keep(tmp_path / "case", "measured", {"size": 1}, ranks=1)
    kept = json.loads((folder / "failure.json").read_text())
    (folder / "failure.json").write_text(json.dumps({**kept, **change}))
    with pytest.raises(IsthmusError, match=re.escape(said)) as told:
        execute(folder, QUIET, seconds=AMPLE)
    assert told.value.exit_code == 2 and "pydantic" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is not JSON: EOF"),
        (b'{"probe": "sums", "title"', "it is not JSON: EOF"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[]", "it is JSON, and no object"),
        (b"{}", "it lacks `probe` (and 10 more such)"),
    ],
)
def test_a_file_that_is_no_kept_failure_is_named_with_what_is_wrong_and_what_to_do(
    tmp_path: Path, content: bytes, said: str
):
    file = tmp_path / "failure.json"
    file.write_bytes(content)
    with pytest.raises(IsthmusError) as told:
        read_case(tmp_path)
    first, second = str(told.value).splitlines()
    assert first.startswith(f"{file}: {said}") and "isthmus qualify RUN --again" in second
    assert told.value.exit_code == 2


def test_tensors_that_torch_cannot_read_are_refused_before_anything_runs(tmp_path: Path):
    folder = keep(tmp_path / "case", "measured", {"size": 1}, ranks=1)
    kept = json.loads((folder / "failure.json").read_text())
    changed = {**kept, "files": ["size"], "arguments": {"size": "inputs.pt"}}
    (folder / "failure.json").write_text(json.dumps(changed))
    torch.save({"t0": torch.ones(400)}, folder / "inputs.pt")
    assert read_case(folder)[1].files == ["size"]
    whole = (folder / "inputs.pt").read_bytes()
    place = whole.index(torch.ones(400).numpy().tobytes()) + 801
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    with zipfile.ZipFile(folder / "other.zip", "w") as other:
        other.writestr("notes.txt", "no tensors")
    for content in (b"", b"nothing", whole[: len(whole) // 2], flipped, (folder / "other.zip").read_bytes()):
        (folder / "inputs.pt").write_bytes(content)
        with pytest.raises(IsthmusError, match=r"inputs\.pt: torch cannot read it"):
            read_case(folder)


def test_a_damaged_failure_beside_a_good_one_is_listed_with_what_is_wrong(tmp_path: Path):
    for number in ("01", "02"):
        keep(tmp_path / "failures" / number, "measured", {"size": 1}, ranks=1)
    (tmp_path / "failures" / "02" / "failure.json").write_text("{")
    with pytest.raises(IsthmusError, match=r"(?s)# A sum that is wrong.*it is not JSON"):
        read_case(tmp_path)


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path: Path):
    folder = keep(tmp_path / "case", "measured", {"size": 1}, ranks=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(IsthmusError, match="--out"):
        execute(folder, QUIET, seconds=AMPLE, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_command_looks_into_the_folder_that_it_is_given(tmp_path: Path):
    result = CliRunner().invoke(cli, ["case", str(tmp_path)])
    assert isinstance(result.exception, IsthmusError) and "holds no failure.json" in str(result.exception)


def test_a_probe_of_another_version_is_told():
    for module in ("isthmus.probes.portable.nothing", "isthmus.probes.portable.traps.nothing"):
        with pytest.raises(IsthmusError, match="has no such probe"):
            source_of(f"{module}:f")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.distributed as dist\nimport os", []),
        ("def f():\n    import numpy", ["numpy"]),
        ("from isthmus.run import Figure", ["isthmus.run"]),
        ("from .operators import x", [".operators"]),
    ],
)
def test_imports_beyond_torch_are_found(source: str, found: list[str]):
    assert foreign_imports(source) == found


def test_names_that_the_runner_would_take_away_are_found():
    assert clashing_names("import json\nfrom typing import Any\nimport torch.distributed as dist\nSIZE = 3") == []
    assert clashing_names("from time import time\ndef reproduce(): ...\nHEALTHY = 2") == [
        "HEALTHY",
        "reproduce",
        "time",
    ]


def test_a_failure_that_comes_and_goes_is_run_often_enough_to_be_seen():
    assert runs_needed(Frequency(10, 10)) == 3
    runs = runs_needed(Frequency(2, 10))
    assert (1 - 0.2) ** runs <= 0.05 < (1 - 0.2) ** (runs - 1)


VARIABLES = {
    "HOME": "/data/people/alice",
    "NCCL_DEBUG": "INFO",
    "OMP_NUM_THREADS": "4",
    "HCCL_CONNECT_TIMEOUT": "7200",
    "HCCL_WHITELIST_FILE": "/data/people/alice/lists/white.json",
    "TORCH_HOME": "/data/people/alice/cache",
    "TORCH_LOGS_OUT": "/data/people/alice",
    "TORCH_TRACE": "/data/people/bob/traces/last",
    "TORCH_API_KEY": "abc",
    "MASTER_ADDR": "admin@node7.example.org",
    "OPENAI_KEY": "abc",
    "ASCEND_HOME_PATH": "/usr/local/Ascend/latest",
}


def test_variables_are_shown_without_secrets_and_places():
    shown = shown_variables(VARIABLES, vendor_of(AWAY).variables)
    assert shown == {
        "ASCEND_HOME_PATH": "/usr/local/Ascend/latest",
        "HCCL_CONNECT_TIMEOUT": "7200",
        "HCCL_WHITELIST_FILE": ".../lists/white.json",
        "MASTER_ADDR": "<address>",
        "OMP_NUM_THREADS": "4",
        "TORCH_HOME": "~/cache",
        "TORCH_LOGS_OUT": "~",
        "TORCH_TRACE": ".../traces/last",
    }
    assert "NCCL_DEBUG" in shown_variables(VARIABLES, vendor_of("h800-sxm").variables)


def test_a_log_keeps_what_helps_and_loses_places():
    line = '  File "/data/people/alice/env/lib/python3.11/site-packages/torch/nn/functional.py", line 3, in f'
    cleaned = without_private(f"{line}\nratio 3/4 of /usr/lib/libx.so at /secret/project/step.py:7", VARIABLES)
    assert '".../site-packages/torch/nn/functional.py", line 3' in cleaned and "3/4 of /usr/lib/libx.so" in cleaned
    assert "alice" not in cleaned and "/secret" not in cleaned and ".../project/step.py:7" in cleaned


@pytest.mark.parametrize("name", vendors())
def test_every_vendor_tells_its_versions_where_nothing_of_it_is_installed(name: str):
    vendor = vendors()[name]
    told = describe_machine(vendor.device, vendor)
    assert f"torch: {torch.__version__}" in told and "devices: " in told and "None" not in told.partition("torch's")[0]


def test_a_device_type_that_torch_does_not_have_needs_an_extension():
    own = {"cpu", "cuda", "xpu", "mps"}
    assert all((vendor.package is None) == (vendor.device in own) for vendor in vendors().values())
    assert vendor_of(AWAY).package == "torch_npu" and len(load_chips()) > 5


def test_the_version_of_the_vendors_software_is_read_from_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = tmp_path / f"{os.uname().machine}-linux" / "ascend_toolkit_install.info"
    record.parent.mkdir()
    record.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100\n")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    assert vendor_of(AWAY).versions()["CANN"] == "8.5.0"
