"""Inspect: what a bundle is, what was found out about it, and who vouches for it. Reads a folder, changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from isthmus.chain import EVENTS, FILES
from isthmus.errors import DamagedFile, GateRefused, IsthmusError
from isthmus.forecast.count import count_parameters
from isthmus.formats import recognise_format
from isthmus.formats.files.bundle import CHECKSUMS, CONFIG, SEAL, architecture_of, read_config, verify_files
from isthmus.formats.files.published import StoredTensors, weight_files
from isthmus.lock import NAME as LOCK
from isthmus.parity.gate import STYLES as OUTCOMES
from isthmus.parity.gate import check_list, ledger_table, shown
from isthmus.parity.manifest import MANIFEST, Manifest, read_manifest, tensor_hashes
from isthmus.parity.seal import Lineage, State, read_verdict, standing, verify_seal
from isthmus.parity.signing import read_trusted
from isthmus.progress import Watch
from isthmus.records import HandoffRecord, LedgerRow, ParityVerdict, WeightsRecord, costliest, step_record
from isthmus.run import RunFolder, meant_run
from isthmus.trainer.checkpoint_files import read_manifest as read_checkpoint
from isthmus.trainer.checkpoint_files import verify_file

SHOWN_TENSORS, SHOWN_LOOSE = 40, 5
STYLES: dict[str, str] = {
    "sealed": "bold green",
    "unsealed": "yellow",
    "untrusted": "bold red",
    "tampered": "bold red",
    "refused": "bold red",
    **OUTCOMES,
}


class Inspection(BaseModel):
    """What `isthmus inspect` found. Sizes in bytes; `signature` says in words what it is worth; hashes in hexadecimal.
    `parameters` are those of the model, in all and used for a token; none where the architecture is not understood.
    `problems` are files that are there and cannot be read.

    `checks` and `ledger` are those of verdict.json, without one the checks of the seal. The ledger has its worst rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    state: State
    reason: str
    problems: list[str]
    architecture: str
    parameters: dict[str, int]
    format: str
    bytes: int
    files: int
    tensors: dict[str, int]
    content: str | None
    seal: str | None
    signature: str
    verdict: str | None
    culprit: str | None
    operator: str | None
    checks: list[dict[str, str | None]]
    ledger: list[LedgerRow]
    lineage: dict[str, str]
    manifest: str | None
    source: str | None
    coverage: dict[str, int]
    parent: str | None


class RunFiles(BaseModel):
    """What was found in a run folder: files that are not what the run left, by name, and what cannot be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    files: int
    breaks: list[str]
    notes: list[str]


class Difference(BaseModel):
    """How two bundles differ, by the hashes of their tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    other: str
    same: int
    changed: list[str]
    only_here: list[str]
    only_there: list[str]


def execute(
    folder: Path, watch: Watch, *, as_json: bool = False, diff: Path | None = None, trust: Path | None = None
) -> Inspection | RunFiles:
    """Show a bundle, and how it differs from `diff`. `trust`: a file of public keys, one of which must have signed.

    Of a run folder all files are checked, and the bundle that its hand-off was about is shown; a drill has none. Raises
    GateRefused that names the files that were touched, and IsthmusError if there is no bundle.
    """
    run = meant_run(folder)
    if (run / "recipe.json").is_file() and not (folder / CONFIG).is_file():
        checked = _checked(run, watch, quiet=as_json)
        if RunFolder.open(run).recipe.drill is not None:
            if diff is not None or trust is not None:
                raise IsthmusError(
                    f"{run} is a drill: nothing of it is sealed, so there is no bundle to compare or trust"
                )
            if as_json:
                _print_json(checked.model_dump(mode="json"), watch)
            return checked
    folder = find_bundle(folder)
    found = inspect(folder, read_trusted(trust) if trust else None)
    difference = compare(folder, diff) if diff is not None else None
    if as_json:
        content = found.model_dump(mode="json")
        _print_json(content | ({"diff": difference.model_dump(mode="json")} if difference else {}), watch)
    else:
        watch.console.print(render(found))
        if difference is not None:
            watch.console.print(render_difference(difference))
    return found


def _checked(run: Path, watch: Watch, *, quiet: bool) -> RunFiles:
    """The check of a run folder, shown. Raises GateRefused that names the files that were touched."""
    checked = check_run(run)
    if not quiet:
        watch.console.print(render_run(checked))
    if checked.breaks:
        raise GateRefused(
            f"{checked.folder} is not as its run left it: {'; '.join(checked.breaks)}. Restore what was touched; "
            "or delete it, and the run makes it again as far as it can, and its dossier says so."
        )
    return checked


def _print_json(content: dict[str, Any], watch: Watch) -> None:
    watch.console.print(json.dumps(content, indent=2), highlight=False, markup=False, soft_wrap=True)


def check_run(folder: Path) -> RunFiles:
    """Every file of a run folder against its hash: events, records and what stages left, checkpoints and bundles."""
    try:
        run = RunFolder.open(folder)
    except IsthmusError as error:
        return RunFiles(folder=str(folder), files=1, breaks=[f"recipe.json: {error}"], notes=[])
    found = [str(broken) for broken in run.breaks()]
    checkpoints = sorted(folder.glob("steps/*/checkpoints/step-*"))
    bundles = sorted({path.parent for name in (CHECKSUMS, CONFIG, SEAL) for path in folder.glob(f"**/{name}")})
    last = {} if found else _last_checkpoints(run)
    for checkpoint in checkpoints:
        found += _touched(folder, checkpoint, partial(_check_checkpoint, checkpoint, last.get(checkpoint)))
    for missing in sorted(last.keys() - set(checkpoints)):
        found.append(f"{missing.relative_to(folder)} is missing")
    for bundle in bundles:
        found += _touched(folder, bundle, partial(_check_bundle, bundle))
    if not found and (record := run.read_record("parity", HandoffRecord)) is not None:
        found += [f"{name} is missing" for name in record.bundles.values() if not (folder / name).is_dir()]
        if record.seal_id is not None and not found:
            sealed = folder / record.bundles[record.format]
            found += _touched(folder, sealed / SEAL, partial(verify_seal, sealed, record.seal_id))
    known = 0 if found else len(run.kept)
    notes = [] if run.digest or found else [f"{folder} is from before runs had hashes: its records cannot be checked"]
    notes += ["it is a drill: nothing of it is handed off, so it has no bundle to show"] if run.recipe.drill else []
    if not found and (loose := _loose(run, [*checkpoints, *bundles])):
        more = f" and {len(loose) - SHOWN_LOOSE} more" if loose[SHOWN_LOOSE:] else ""
        notes.append(f"not checked, for nothing rests on them: {', '.join(loose[:SHOWN_LOOSE])}{more}")
    return RunFiles(folder=str(folder), files=known + len(checkpoints) + len(bundles), breaks=found, notes=notes)


def _loose(run: RunFolder, folders: list[Path]) -> list[str]:
    """Files that no hash is known of, such as what engines printed."""
    known = run.kept | {EVENTS, FILES, LOCK}
    files = (path for path in sorted(run.path.rglob("*")) if path.is_file() and not set(path.parents) & set(folders))
    return [name for path in files if (name := path.relative_to(run.path).as_posix()) not in known]


def _last_checkpoints(run: RunFolder) -> dict[Path, str]:
    """By folder the hash of the checkpoint that each step left."""
    records = (step_record(run, step.name) for step in run.recipe.step)
    return {run.path / one.checkpoint: one.checkpoint_sha256 for one in records if isinstance(one, WeightsRecord)}


def _touched(run: Path, folder: Path, check: Callable[[], object]) -> list[str]:
    try:
        check()
    except IsthmusError as error:
        return [f"{folder.relative_to(run)}: {error}"]
    return []


def _check_checkpoint(folder: Path, sha256: str | None) -> None:
    manifest, _ = read_checkpoint(folder, sha256)
    for file in manifest.files:
        verify_file(folder, manifest, file)


def _check_bundle(folder: Path) -> None:
    """A sealed one by its seal, any other by its checksums."""
    if (folder / SEAL).is_file():
        verify_seal(folder)
        return
    verify_files(folder)


def render_run(found: RunFiles) -> RenderableType:
    """The check of a run folder for a person."""
    state = f"{len(found.breaks)} touched" if found.breaks else "all as the run left them"
    lines = [f"{found.folder}: {found.files} files, checkpoints and bundles, {state}", *found.breaks, *found.notes]
    return Text("\n".join(lines), style="bold red" if found.breaks else "")


def find_bundle(folder: Path) -> Path:
    """The bundle that is meant: the folder itself, or that of the hand-off of a run, or of the `bundle` of a run."""
    run = meant_run(folder)
    if (folder / CONFIG).is_file() or not (run / "recipe.json").is_file():
        return folder
    record = RunFolder.open(run).require_record("parity", HandoffRecord, "handoff")
    if record.format not in record.bundles:
        raise IsthmusError(f"the hand-off of {run} left no bundle in {record.format}; see {run / 'parity.json'}")
    return run / record.bundles[record.format]


def inspect(folder: Path, trusted: list[str] | None = None) -> Inspection:
    """Everything that the folder says of itself, and whether it is true."""
    config = read_config(folder)
    where = standing(folder, trusted=trusted)
    verdict, manifest, problems = _read(folder)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    checks: list[dict[str, str | None]] = [shown(check) for check in verdict.checks] if verdict else []
    if not checks and where.seal is not None:
        checks = [{"name": name, "found": said} for name, said in where.seal.checks.items()]
    lineage = where.seal.lineage if where.seal else Lineage()
    return Inspection(
        folder=str(folder),
        state=where.state,
        reason=where.reason,
        problems=problems,
        architecture=str(config.get("model_type", "unknown")),
        parameters=_parameters(folder, config),
        format=_format_name(config),
        bytes=sum(path.stat().st_size for path in paths),
        files=len(paths),
        tensors=_kinds(folder),
        content=where.seal.content if where.seal else None,
        seal=where.seal.id if where.seal else None,
        signature=_signature(where.seal.signer if where.seal else None, where.state, trusted),
        verdict=verdict.verdict if verdict else (where.seal.verdict if where.seal else None),
        culprit=verdict.culprit if verdict else None,
        operator=verdict.operator if verdict else None,
        checks=checks,
        ledger=costliest(verdict.ledger) if verdict else [],
        lineage={key: value for key, value in lineage.model_dump().items() if value is not None},
        manifest=manifest.id if manifest else None,
        source=manifest.source if manifest else None,
        coverage=dict(Counter(entry.fate for entry in manifest.coverage)) if manifest else {},
        parent=where.seal.parent if where.seal else (manifest.parent if manifest else None),
    )


def compare(folder: Path, other: Path) -> Difference:
    """Which tensors differ between two bundles, by the hashes of their manifests, or of the tensors without one."""
    here, there = _hashes(folder), _hashes(other)
    shared = here.keys() & there.keys()
    changed = sorted(name for name in shared if here[name] != there[name])
    return Difference(
        other=str(other),
        same=len(shared) - len(changed),
        changed=changed,
        only_here=sorted(here.keys() - there.keys()),
        only_there=sorted(there.keys() - here.keys()),
    )


def render(found: Inspection) -> RenderableType:
    """An inspection for a person."""
    table = Table(title=found.folder, title_justify="left", show_header=False)
    table.add_column("what", style="dim", no_wrap=True)
    table.add_column("is", overflow="fold")
    table.add_row("state", Text(found.state, style=STYLES[found.state]))
    if found.reason:
        table.add_row("why", Text(found.reason))
    for problem in found.problems:
        table.add_row("problem", Text(problem, style="bold red"))
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.tensors.items())
    rows = {
        "architecture": found.architecture,
        "parameters": _told(found.parameters),
        "format": found.format,
        "size": f"{found.bytes:,} bytes in {found.files} files",
        "tensors": kinds,
        "verdict": found.verdict or "none: no gate has been asked",
        "culprit": " / ".join(filter(None, (found.culprit, found.operator))),
        "seal": found.seal or "none that holds",
        "signature": found.signature,
        "content": found.content or "",
        "parent": found.parent or "none",
        "manifest": found.manifest or "none",
        "source": found.source or "",
        "coverage": ", ".join(f"{count} {fate}" for fate, count in found.coverage.items()),
        **{key.replace("_", " "): value for key, value in found.lineage.items() if key != "source_sha256"},
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value, style=STYLES.get(value, "")))
    checks = [check_list("checks", found.checks)] if found.checks else []
    return Group(table, *checks, *([ledger_table(found.ledger)] if found.ledger else []))


def render_difference(difference: Difference) -> RenderableType:
    """A difference for a person."""
    table = Table(title=f"against {difference.other}: {difference.same} tensors are the same", title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("difference")
    rows = [(name, "changed") for name in difference.changed]
    rows += [(name, "only here") for name in difference.only_here]
    rows += [(name, "only there") for name in difference.only_there]
    for name, what in rows[:SHOWN_TENSORS]:
        table.add_row(Text(name), what)
    if len(rows) > SHOWN_TENSORS:
        table.add_row(f"and {len(rows) - SHOWN_TENSORS} more; --json lists all", "")
    return table


def _read(folder: Path) -> tuple[ParityVerdict | None, Manifest | None, list[str]]:
    """Verdict and manifest, and which of them is there and cannot be read."""
    verdict, manifest, problems = None, None, []
    try:
        verdict = read_verdict(folder)
    except DamagedFile as error:
        problems.append(str(error))
    try:
        manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    except DamagedFile as error:
        problems.append(str(error))
    return verdict, manifest, problems


def _signature(signer: str | None, state: State, trusted: list[str] | None) -> str:
    if signer is None:
        return "none"
    if trusted is None:
        return f"by {signer}; whether to trust it was not asked (--trust FILE)"
    return f"by {signer}, {'who is trusted' if state == 'sealed' else 'who is not trusted'}"


def _format_name(config: dict[str, Any]) -> str:
    try:
        return recognise_format(config).name
    except IsthmusError as error:
        return f"unknown: {error}"


def _parameters(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    try:
        counted = count_parameters(architecture_of(folder, config))
    except IsthmusError:
        return {}
    return {"total": counted.total, "active": counted.active}


def _told(parameters: dict[str, int]) -> str:
    if not parameters:
        return "unknown: this architecture is not understood"
    total, active = parameters["total"], parameters["active"]
    return f"{total:,}" if active == total else f"{total:,}, of which a token uses {active:,}"


def _kinds(folder: Path) -> dict[str, int]:
    """How many tensors there are of each dtype, in the words of safetensors."""
    if not weight_files(folder):
        return {}
    with StoredTensors(folder) as stored:
        return dict(Counter(stored.kind(name) for name in stored.names).most_common())


def _hashes(folder: Path) -> dict[str, str]:
    if not (folder / MANIFEST).is_file():
        return tensor_hashes(folder)
    return read_manifest(folder).tensors
