"""What two runs of one recipe must agree in, and faults in the files of a run, for benchmarks/kills.py."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.parity.seal import standing, verify_seal
from isthmus.progress import Watch
from isthmus.records import HandoffRecord, PlanRecord, QualifyRecord, TextRecord, read_weights, step_record
from isthmus.run import RunFolder
from isthmus.stages import steps
from isthmus.tools.inspect import check_run
from isthmus.trainer.checkpoint import load_model_state
from tests.support.touched import plant

TIMES = ("started", "ended", "seconds", "time", "resumed_from", "tokens_per_s", "rollout_tokens_per_s", "memory_gib")
"""Names of what is about the time that something took, or about the process; so are those that end in `_s`."""
UNTOLD = ("start", "resume", "fallback", "crossing", "incident", "alarm", "evaluate", "end")
"""Events of a step that a restarted one has more of."""


def told(folder: Path) -> dict[str, Any]:
    """All that does not depend on how long something took, nor on how often the run was started."""
    run = RunFolder.open(folder)
    home, plan = (
        run.require_record("qualify/home", QualifyRecord, "qualify"),
        run.require_record("plan", PlanRecord, "plan"),
    )
    found: dict[str, Any] = {
        "qualify": [home.verdict, sorted((one.name, one.outcome) for one in home.evidence)],
        "plan": [(place.stage, place.pool) for place in plan.placements],
    }
    for step in run.recipe.step:
        if step_record(run, step.name) is not None:
            found |= _of_step(run, step.name)
    parity = run.read_record("parity", HandoffRecord)
    if parity is not None:
        bundle = folder / parity.bundles[parity.format]
        seal = standing(bundle).seal
        found["seal"] = [parity.verdict, seal.content if seal is not None else None]
        found["bundle"] = untimed(json.loads((bundle / "manifest.json").read_bytes()))
        found["checks"] = [(check.layer, check.name, check.outcome) for check in parity.checks]
    return found


def _of_step(run: RunFolder, name: str) -> dict[str, Any]:
    folder = run.step_folder(name)
    manifests = sorted(folder.glob("checkpoints/step-*/manifest.json"))
    answers = sorted([*folder.glob("heldout-*.json"), *folder.glob("replay-*.json"), *folder.glob("rollout-0*.json")])
    return {
        f"{name}: record": untimed(json.loads((folder / "record.json").read_bytes())),
        f"{name}: checkpoint": read_weights(run, name).checkpoint_sha256,
        f"{name}: checkpoints": {path.parent.name: json.loads(path.read_bytes()) for path in manifests},
        f"{name}: samples": {path.name: untimed(json.loads(path.read_bytes())) for path in answers},
        f"{name}: updates": [untimed(event) for event in run.events(name) if event["event"] not in UNTOLD],
    }


def untimed(tree: Any) -> Any:
    """Without what is about time, nor about which start it was."""
    if isinstance(tree, dict):
        return {
            key: untimed(value)
            for key, value in tree.items()
            if key not in (*TIMES, "attempt") and not str(key).endswith("_s")
        }
    return [untimed(one) for one in tree] if isinstance(tree, list) else tree


def differences(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what two runs do not agree in, with the first place."""
    return [
        f"{name}: {_first(mine.get(name), other.get(name))}"
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name)
    ]


def _first(one: Any, other: Any) -> str:
    mine, theirs = dict(_leaves(one)), dict(_leaves(other))
    at = next((key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)), "")
    return f"{at}: {str(mine.get(at))[:60]} and {str(theirs.get(at))[:60]}"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{path}/{key}")


def goes_on_unseen(folder: Path, touched: list[Path], taught: str) -> bool:
    """Whether a server, or a run, takes a folder as it is and says nothing; `taught` is the end of its first step."""
    names = {path.relative_to(folder).as_posix() for path in touched}
    bundles = {name.split("/")[1] for name in names if name.startswith("bundle/")}
    if bundles:
        return not any(_is_refused(folder / "bundle" / name) for name in bundles)
    try:
        run = RunFolder.open(folder)
        run.go_on()
        if any(name in event["what"] for event in run.events("run", "fallback") for name in names):
            return False
        return _continues_wrongly(run, taught, names)
    except IsthmusError:
        return False


def _is_refused(bundle: Path) -> bool:
    try:
        verify_seal(bundle)
    except IsthmusError:
        return True
    return False


def _continues_wrongly(run: RunFolder, taught: str, names: set[str]) -> bool:
    """A step that is not done is continued, and has to come to the undisturbed end; of one that is done the weights
    are loaded, as the next step would. Older checkpoints of a step that is done, and what its engine began with, serve
    nothing any more."""
    first = run.recipe.step[0].name
    if run.read_record(f"steps/{first}/record", TextRecord) is None:
        steps.execute(run, Watch(quiet=True), name=first)
        return read_weights(run, first).checkpoint_sha256 != taught
    for step in run.recipe.step:
        record = read_weights(run, step.name)
        load_model_state(run.path / record.checkpoint, record.checkpoint_sha256)
    return not all("/checkpoints/" in name or "/rollout-bundle/" in name for name in names)


def one_fault(folder: Path, whole: dict[Path, bytes], taught: str, chance: random.Random) -> dict[str, Any]:
    """Plant a fault, look, and put everything back."""
    kind, touched = plant(chance, [path for path, content in whole.items() if content])
    names = [path.relative_to(folder).as_posix() for path in touched]
    breaks = check_run(folder).breaks
    named = any(name in line or Path(name).name in line for name in names for line in breaks)
    unseen = goes_on_unseen(folder, touched, taught)
    restore(folder, whole)
    return {"kind": kind, "files": names, "noticed": bool(breaks), "named": named, "goes_on_unseen": unseen}


def restore(folder: Path, whole: dict[Path, bytes]) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in whole:
            path.unlink()
    for path, content in whole.items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
