"""The rules that keep the project honest, held by reading the source and by running the command."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.probes.cases.packing import clashing_names, foreign_imports
from isthmus.recipe.read import load_recipe
from isthmus.run import RunFolder

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "isthmus"
RECIPE = ROOT / "recipes" / "tiny.toml"
PYTHON_FILES = sorted(SOURCE.rglob("*.py"))
TEXT_SUFFIXES = {".py", ".toml", ".csv", ".json", ".jinja", ".html", ".css", ".js", ".svg", ".md", ".txt"}

VENDOR_WORDS = ("cuda", "nvidia", "npu", "ascend", "huawei", "hccl", "nccl", "rocm", "amd", "hip")
VENDOR = re.compile(rf"(?<![A-Za-z])({'|'.join(VENDOR_WORDS)})(?![a-z])", re.IGNORECASE)
DESK_PARTS = "recipe.read run records progress pools forecast rules chips algos tasks rewards"
DESK = ("cli", *DESK_PARTS.split())
DESK_TOOLS = "recipe rules justify forecast validate_forecast steps"
DESK_STAGES = ("stages.plan", "stages.report", *(f"tools.{name}" for name in DESK_TOOLS.split()))
LONGEST_FUNCTION = 80
TESTING_FILES = sorted(file for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
PRIVATE = re.compile(r"(isthmus\..*\.)?_(?!_)\w+")
OTHERS_PRIVATE = {
    "_attn_implementation": "transformers: how a configuration names the attention to use",
    "_c10d_functional": "torch: the namespace of its functional collectives",
    "_coalescing_manager": "torch: collectives that are sent together",
    "_make_nccl_premul_sum": "torch: a reduction that a rehearsed library has to refuse",
    "_get_default_store": "torch: the store that the ranks met at",
    "_all_gather_base": "torch: the collective under its old name",
    "_reduce_scatter_base": "torch: the collective under its old name",
    "_exit": "the standard library: the process ends at once",
    "_vf_weight": "verifiers: how a function says its weight as a reward",
    "_schema": "torch: the schema of an operator",
    "_replace": "the standard library: public, with the underscore of named tuples",
}
"""Private names of others that tests may read, with what they are."""
NEEDED = "import click, jinja2, pydantic, rich.console, tomllib"
"""What the desk cannot do without: its libraries alone, as the measure of this machine's speed today."""
QUICK, TRIES = 5.0, 5


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def source_text_files() -> list[Path]:
    """What we write. The chat page's libraries are others' (`define.amd` is theirs), held by their hashes."""
    others = SOURCE / "engines" / "local" / "page" / "vendor"
    return [
        file
        for file in sorted(SOURCE.rglob("*"))
        if file.suffix in TEXT_SUFFIXES and "__pycache__" not in file.parts and others not in file.parents
    ]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: what is tracked is not known")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file)))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}


def isthmus(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "isthmus", *arguments]


@pytest.mark.parametrize("word", ["cuda", "CUDA", "torch.cuda", "is_npu", "npu0", "hip_runtime", "NCCL", "x.hip"])
def test_the_search_for_vendor_words_finds_them(word: str):
    assert VENDOR.search(word)


@pytest.mark.parametrize("word", ["input", "ship", "chip", "descend", "ascending", "whip", "relationship", "hippo"])
def test_the_search_for_vendor_words_leaves_others_alone(word: str):
    assert not VENDOR.search(word)


@pytest.mark.parametrize("file", source_text_files(), ids=named)
def test_vendor_words_live_under_chips(file: Path):
    if SOURCE / "chips" in file.parents:
        return
    assert not VENDOR.search(file.name), f"{named(file)} is named after a vendor; it belongs under chips/"
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1) if VENDOR.search(line)]
    assert not found, f"ask for a capability, or move this under chips/:\n{named(file)}\n" + "\n".join(found)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(), check=False
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has a recipe and nothing else."""
    return RunFolder.create(tmp_path_factory.mktemp("desk") / "run", load_recipe(RECIPE)).path


@pytest.mark.parametrize("module", (*DESK, *DESK_STAGES))
def test_the_desk_never_loads_torch(module: str):
    result = run_python(f"import sys, isthmus.{module}; sys.exit(3 if 'torch' in sys.modules else 0)")
    assert result.returncode != 3, f"importing isthmus.{module} loads torch"
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "verb",
    [
        "chips",
        "recipe step",
        "steps RECIPE",
        "recipe --markdown",
        "run --dry-run RECIPE",
        "report RUN",
        "forecast RECIPE",
    ],
)
def test_a_desk_verb_never_loads_what_is_slow(verb: str, run_folder: Path):
    arguments = verb.replace("RECIPE", str(RECIPE)).replace("RUN", str(run_folder)).split()
    call = "import sys; from isthmus.cli import cli; cli(sys.argv[1:], standalone_mode=False)"
    code = f"{call}; sys.exit(3 if {{'torch', 'scipy'}} & set(sys.modules) else 0)"
    result = run_python(code, *arguments)
    assert result.returncode != 3, f"isthmus {verb} loads torch or scipy"
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("verb", ["steps", "steps.rl", "handoff", "qualify", "serve"])
def test_a_stage_that_computes_is_not_loaded_with_the_command(verb: str):
    assert importlib.util.find_spec(f"isthmus.stages.{verb}")
    result = run_python(f"import sys, isthmus.cli; sys.exit(3 if 'isthmus.stages.{verb}' in sys.modules else 0)")
    assert result.returncode == 0, result.stderr or f"isthmus.cli loads isthmus.stages.{verb}"


def cpu_seconds(command: list[str]) -> float:
    """Processor time, user and system, of a child: a busy machine does not add to it as it adds to the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "verb", ["--help", "chips", "recipe", "recipe --markdown", "run --dry-run RECIPE", "report RUN", "forecast RECIPE"]
)
def test_the_desk_answers_at_once(verb: str, run_folder: Path):
    arguments = verb.replace("RECIPE", str(RECIPE)).replace("RUN", str(run_folder)).split()
    pairs = [(cpu_seconds(isthmus(*arguments)), cpu_seconds([sys.executable, "-c", NEEDED])) for _ in range(TRIES)]
    ours, needed = (min(times) for times in zip(*pairs, strict=True))
    assert ours <= QUICK * needed, f"isthmus {verb} took {ours:.2f} s of processor time, its libraries {needed:.2f} s"


@pytest.mark.parametrize("file", PYTHON_FILES, ids=named)
def test_no_exception_is_caught_without_being_known(file: Path):
    broad = {"Exception", "BaseException"}
    for node in nodes(file):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {one.id for one in caught if isinstance(one, ast.Name)}
        raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        where = f"{named(file)}:{node.lineno}"
        assert node.type is not None, f"{where}: a bare except"
        assert "Exception" not in names, f"{where}: except Exception"
        assert not (names & broad) or raises_again, f"{where}: except BaseException that does not raise again"


@pytest.mark.parametrize("file", PYTHON_FILES, ids=named)
def test_nothing_is_unpickled(file: Path):
    pickles = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in nodes(file):
        where = f"{named(file)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not pickles & {alias.name.partition(".")[0] for alias in node.names}, where
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in pickles, where
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("allow_pickle", "False") == "False", where
            assert ast.unparse(node.func) != "torch.load" or given.get("weights_only") == "True", (
                f"{where}: weights_only=True"
            )


@pytest.mark.parametrize("file", PYTHON_FILES, ids=named)
def test_no_function_is_long(file: Path):
    for node in nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{named(file)}:{node.lineno}: {node.name} has {lines} lines"


PORTABLE = [file for file in PYTHON_FILES if file.parent == SOURCE / "probes" / "portable" and file.stem != "__init__"]


@pytest.mark.parametrize("file", [*PORTABLE, SOURCE / "probes" / "cases" / "reproduction.py"], ids=named)
def test_what_is_given_away_needs_torch_alone(file: Path):
    source = file.read_text(encoding="utf-8")
    assert foreign_imports(source) == [], f"{named(file)} may import torch and the standard library, nothing else"
    if file in PORTABLE:
        assert clashing_names(source) == [], f"{named(file)} and probes/cases/reproduction.py define the same names"
        assert "from __future__ import annotations\n" in source, f"{named(file)} has to run with older Pythons"


@pytest.mark.parametrize("file", PORTABLE, ids=named)
def test_what_a_portable_function_takes_and_gives_can_be_json(file: Path):
    allowed = {"dict", "list", "tuple", "str", "int", "float", "bool", "None", "Any"}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        returned = "" if node.returns is None else ast.unparse(node.returns)
        if not node.args.args or ast.unparse(node.args.args[0]) != "rank: Any" or not returned.startswith("dict["):
            continue
        types = [argument.annotation for argument in (*node.args.args[1:], *node.args.kwonlyargs)] + [node.returns]
        for given in types:
            assert given is not None, f"{named(file)}:{node.lineno}: {node.name} lacks an annotation"
            names = {one.id for one in ast.walk(given) if isinstance(one, ast.Name)}
            assert names <= allowed, f"{named(file)}:{node.lineno}: {node.name}: {ast.unparse(given)} is not JSON"


def test_imports_go_one_way():
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    assert command, "import-linter is not installed; install the dev extra"
    result = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, env=environment(), check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("file", PYTHON_FILES, ids=named)
def test_nothing_of_isthmus_is_imported_inside_a_function(file: Path):
    functions = [node for node in nodes(file) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [
        f"{named(file)}:{node.lineno}: {ast.unparse(node)}"
        for function in functions
        for node in ast.walk(function)
        if (isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == "isthmus"))
        or (isinstance(node, ast.Import) and any(one.name.partition(".")[0] == "isthmus" for one in node.names))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", [file for file in PYTHON_FILES if file.name == "__init__.py"], ids=named)
def test_no_module_of_a_package_takes_the_name_of_what_the_package_imports(file: Path):
    """Importing `package.math` binds `math` in the package, over an `import math` of its own."""
    imports = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.Import)]
    imported = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    modules = {path.stem for path in file.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert not imported & modules, f"a module of this package has the name of what {named(file)} imports"


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what a file reaches that is private to another: an object says `self._x`, and nobody else."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "isthmus":
            path = [*(node.module or "").split("."), *(one.name for one in node.names)]
            yield from ((node.lineno, part) for part in path if PRIVATE.fullmatch(part))
        elif isinstance(node, ast.Import):
            paths = [one.name.split(".") for one in node.names if one.name.startswith("isthmus.")]
            yield from ((node.lineno, part) for path in paths for part in path if PRIVATE.fullmatch(part))
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and re.search(r"\b(get|set|del|has)attr$", ast.unparse(node.func)):
            texts = [one.value for one in node.args[:2] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            yield from ((node.lineno, text) for text in texts if PRIVATE.fullmatch(text))


@pytest.mark.parametrize(
    "line",
    [
        "from isthmus.pools import _quota_cores",
        "from isthmus.chips._registry import vendors",
        "import isthmus.chips._registry",
        "core._thread.join()",
        "server.gate._held == 1",
        "monkeypatch.setattr(delta, '_fold', fold)",
        "monkeypatch.setattr('isthmus.formats.updates.delta._fold', fold)",
        "getattr(core, '_thread')",
    ],
)
def test_the_search_for_private_names_finds_them(line: str):
    assert list(private_names(ast.parse(line)))


@pytest.mark.parametrize("file", TESTING_FILES, ids=named)
def test_no_test_reaches_a_private_name(file: Path):
    found = [f"{line}: {name}" for line, name in private_names(ast.parse(file.read_text(encoding="utf-8")))]
    wrong = [one for one in found if one.partition(": ")[2] not in OTHERS_PRIVATE]
    assert not wrong, f"test behaviour, or give the code a public seam:\n{named(file)}\n" + "\n".join(wrong)


SHARED_CLOCK = re.compile(r"setattr\(\s*(?:\w+\.)*time,|setattr\(\s*[\"'](?:\w+\.)*time\.(?!time[\"'])")


@pytest.mark.parametrize(
    "line",
    [
        'monkeypatch.setattr(members.time, "monotonic", f)',
        'patch.setattr(\n    time, "sleep", f)',
        "setattr('time.sleep', f)",
    ],
)
def test_the_search_for_a_changed_clock_finds_it(line: str):
    assert SHARED_CLOCK.search(line)


@pytest.mark.parametrize("file", [file for file in TESTING_FILES if file.name != "test_rules.py"], ids=named)
def test_no_test_changes_the_clock_of_the_whole_process(file: Path):
    """An event loop of another test that sleeps by a changed clock may never wake: change the module's own name."""
    assert not SHARED_CLOCK.search(file.read_text())


def layered_modules() -> set[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = [layer for contract in contracts if contract["type"] == "layers" for layer in contract["layers"]]
    return {re.sub(r"[() ]", "", name) for layer in layers for name in re.split(r"[|:]", layer)}


def top_level() -> list[str]:
    """The modules and packages of `isthmus`, as `name.py` and `name/`."""
    modules = [file.name for file in SOURCE.glob("*.py") if not file.name.startswith("__")]
    return sorted(modules + [f"{file.parent.name}/" for file in SOURCE.glob("*/__init__.py")])


@pytest.mark.parametrize("name", top_level())
def test_every_module_with_imports_of_its_own_stands_in_a_layer(name: str):
    package = SOURCE / name.rstrip("/")
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package]
    own = [
        node
        for file in files
        for node in nodes(file)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("isthmus.")
    ]
    module = f"isthmus.{name.rstrip('/').removesuffix('.py')}"
    assert not own or module in layered_modules(), (
        f"{module} is in no layer of [tool.importlinter], so nothing holds its imports"
    )


def readme_tree() -> dict[str, str]:
    """Name and remark of each line under `src/isthmus/` in the README's tree."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    root = next((number for number, line in enumerate(lines) if line.strip() == "src/isthmus/"), None)
    assert root is not None, "README.md has no tree with a line src/isthmus/"
    depth = len(lines[root]) - len(lines[root].lstrip())
    below = itertools.takewhile(lambda line: len(line) - len(line.lstrip()) > depth, lines[root + 1 :])
    entries = [line.split(maxsplit=1) for line in below]
    return {entry[0]: entry[1] if len(entry) > 1 else "" for entry in entries}


@pytest.mark.parametrize("name", top_level())
def test_the_readme_tree_says_what_each_module_is(name: str):
    assert readme_tree().get(name), f"README.md's tree has no line for {name}, or the line says nothing about it"


def test_the_readme_tree_names_nothing_that_is_not_there():
    named_files = [name for name in readme_tree() if name != "--"]
    assert [name for name in named_files if not (SOURCE / name).exists()] == []


def test_no_tracked_file_knows_the_place_where_it_was_written():
    """Paths of one machine, the words of one workplace, and package sources do not belong to the project."""
    places = ["/".join(("", "work", "")), "/".join(("", "tmp", "w")), "/".join(("", "root", "")), str(ROOT) + "/"]
    words = ["_".join(("before", "stop")), "-".join(("index", "url")), "-".join(("find", "links"))]
    pattern = re.compile("|".join(re.escape(text) for text in [*places, *words]))
    found = []
    for file in tracked_files():
        if file.suffix in TEXT_SUFFIXES or file.name in ("Makefile", "run", "LICENSE"):
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [
                f"{named(file)}:{number}: {line.strip()[:100]}"
                for number, line in enumerate(lines, 1)
                if pattern.search(line)
            ]
    assert not found, "\n".join(found)
