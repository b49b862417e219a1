"""Verify: the gate on the machine of the target, with nothing but the bundle; it seals what passes.

`--url` verifies an engine that another process runs: tokens and log-probabilities, which is all that an API shows.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from isthmus.engines.remote import HttpEngine
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats.files.bundle import SEAL, read_bundle
from isthmus.parity.capture import GoldenSet
from isthmus.parity.engine import check_engine, compare_engine
from isthmus.parity.gate import check_table, judge, ledger_table, refusal, shown, unmeasured
from isthmus.parity.manifest import check_manifest
from isthmus.parity.seal import Lineage, read_verdict, write_seal
from isthmus.parity.target import DTYPES
from isthmus.parity.verify import Limits, Target, check_format_cost, verify_bundle, write_verdict
from isthmus.progress import Watch
from isthmus.records import Check, ParityVerdict, costliest

BEHIND_A_URL = Check(
    layer="modules",
    name="modules, whole distributions, and what config.json sets",
    outcome="caution",
    detail="were not looked at: the API of an engine shows log-probabilities of tokens and nothing else",
)


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
    max_mean_kl: float,
    sign_key: Path | None,
) -> ParityVerdict:
    """Verify, say what was found, write the verdict and seal. Raises GateRefused unless every check passed.

    What an earlier gate refused and this one cannot look at, such as the task of a hand-off, is still refused.
    """
    if dtype not in DTYPES:
        raise IsthmusError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if (folder / SEAL).exists():
        raise IsthmusError(f"{folder} is sealed already; `isthmus inspect {folder}` shows its seal")
    limits = Limits(max_chip_kl, max_mean_kl, source="isthmus verify")
    if url is not None:
        verdict = verify_url(folder, url, api_key, limits)
    else:
        target = Target(device or default_device(), dtype, rehearse)
        watch.say(f"  {folder} on {target}")
        with watch.count("blocks", 1) as counter:
            verdict = verify_bundle(folder, target=target, limits=limits, tell=counter.tell)
    layers = ("files",) if url is not None else ("files", "config", "modules")
    if left := unmeasured(read_verdict(folder), verdict.checks, layers):
        verdict = verdict.model_copy(update={"verdict": "refuse", "checks": [*verdict.checks, *left]})
    watch.console.print(check_table(f"parity on {verdict.target}: {verdict.verdict}", map(shown, verdict.checks)))
    if verdict.ledger:
        watch.console.print(ledger_table(costliest(verdict.ledger)))
    write_verdict(folder, verdict)
    if verdict.verdict == "refuse":
        opening = f"{folder} is refused, and not sealed."
        raise GateRefused(refusal(opening, verdict.checks, verdict.culprit, verdict.operator))
    seal = write_seal(
        folder, verdict="pass", checks=verdict.checks, lineage=Lineage(target_pool=verdict.target), sign_key=sign_key
    )
    watch.say(f"  sealed as {seal.id}")
    return verdict


def verify_url(folder: Path, url: str, api_key: str | None, limits: Limits | None = None) -> ParityVerdict:
    """What an engine at a URL says of the golden sequences, against the emulator of this bundle."""
    started = time.time()
    checks = check_manifest(folder)
    bundle, golden = read_bundle(folder), GoldenSet(folder)
    checks.insert(0, check_format_cost(golden, limits or Limits()))
    engine = HttpEngine(url, api_key)
    engine.start(folder)
    found = compare_engine(engine.score, bundle.build(), golden.listed.golden_sequences())
    where = f"{engine.server} at {url}"
    return judge([*checks, BEHIND_A_URL, *check_engine(found, where)], target=where, rehearsed=False, started=started)


def default_device() -> str:
    """The accelerator of this machine as torch knows it, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"
