"""Verify: the gate on the machine of the target, with nothing but the bundle; it seals what passes.

`--url` verifies an engine that another process runs: tokens and log-probabilities, which is all that an API shows.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.table import Table

from isthmus import __version__
from isthmus.engines.remote import HttpEngine
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats.files.bundle import SEAL, read_bundle
from isthmus.parity.capture import GoldenSet
from isthmus.parity.engine import check_engine, compare_engine
from isthmus.parity.manifest import check_manifest
from isthmus.parity.seal import Lineage, write_seal
from isthmus.parity.target import DTYPES
from isthmus.parity.verify import Limits, Target, verify_bundle, write_verdict
from isthmus.progress import Watch
from isthmus.records import ParityVerdict

STYLES = {"pass": "green", "fail": "bold red", "unknown": "yellow"}
LEDGER_ROWS = 6


def execute(
    folder: Path,
    watch: Watch,
    *,
    device: str | None,
    dtype: str,
    rehearse: str | None,
    url: str | None,
    api_key: str | None,
    max_chip_kl: float,
    sign_key: Path | None,
) -> ParityVerdict:
    """Verify, say what was found, write the verdict and seal. Raises GateRefused if a check failed."""
    if dtype not in DTYPES:
        raise IsthmusError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if (folder / SEAL).exists():
        raise IsthmusError(f"{folder} is sealed already; `isthmus inspect {folder}` shows its seal")
    if url is not None:
        verdict = verify_url(folder, url, api_key)
    else:
        target = Target(device or default_device(), dtype, rehearse)
        watch.say(f"  {folder} on {target}")
        with watch.count("blocks", 1) as counter:
            limits = Limits(max_chip_kl=max_chip_kl, source="the command line")
            verdict = verify_bundle(folder, target=target, limits=limits, tell=counter.tell)
    show(verdict, watch)
    write_verdict(folder, verdict)
    if verdict.verdict == "refuse":
        raise GateRefused(refusal(folder, verdict))
    seal = write_seal(
        folder, verdict="pass", checks=verdict.checks, lineage=Lineage(target_pool=verdict.target), sign_key=sign_key
    )
    watch.say(f"  sealed as {seal.id}")
    return verdict


def verify_url(folder: Path, url: str, api_key: str | None) -> ParityVerdict:
    """What an engine at a URL says of the golden sequences, against the emulator of this bundle."""
    started = time.time()
    checks = check_manifest(folder)
    bundle, golden = read_bundle(folder), GoldenSet(folder)
    engine = HttpEngine(url, api_key)
    engine.start(folder)
    found = compare_engine(engine.score, bundle.build(), golden.listed.golden_sequences())
    checks += check_engine(found, f"{engine.server} at {url}")
    return ParityVerdict(
        verdict="refuse" if any(check.outcome == "fail" for check in checks) else "pass",
        target=f"{engine.server} at {url}",
        rehearsed=False,
        checks=checks,
        ledger=[],
        culprit=None,
        operator=None,
        isthmus=__version__,
        torch=torch.__version__,
        started=started,
        ended=time.time(),
    )


def default_device() -> str:
    """The accelerator of this machine as torch knows it, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def show(verdict: ParityVerdict, watch: Watch) -> None:
    """The checks, and the costliest blocks."""
    table = Table(title=f"parity on {verdict.target}: {verdict.verdict}", title_justify="left")
    for column in ("layer", "check", "outcome", "found", "limit"):
        table.add_column(column, overflow="fold")
    for check in verdict.checks:
        outcome = f"[{STYLES[check.outcome]}]{check.outcome}[/]"
        table.add_row(check.layer, check.name, outcome, str(check.figure or "-"), str(check.limit or "-"))
        if check.outcome != "pass":
            table.add_row("", f"[dim]{check.detail}[/]", "", "", "")
    watch.console.print(table)
    if not verdict.ledger:
        return
    ledger = Table(title="error ledger, the costliest blocks", title_justify="left")
    for column in ("block", "quantisation", "chip", "floor of the chip"):
        ledger.add_column(column, overflow="fold")
    rows = sorted(verdict.ledger, key=lambda row: (row.quantisation or 0.0) + (row.chip or 0.0), reverse=True)
    for row in rows[:LEDGER_ROWS]:
        values = (
            f"{100 * value:.3g} %" if value is not None else "-" for value in (row.quantisation, row.chip, row.floor)
        )
        ledger.add_row(row.module, *values)
    watch.console.print(ledger)


def refusal(folder: Path, verdict: ParityVerdict) -> str:
    """Why, in words, and where the fault is."""
    lines = [f"{folder} is refused, and not sealed."]
    if verdict.culprit:
        lines.append(
            f"The fault is in {verdict.culprit}{f', operator {verdict.operator}' if verdict.operator else ''}."
        )
    lines += [f"  {check.name}: {check.detail}" for check in verdict.checks if check.outcome == "fail"]
    return "\n".join(lines)
