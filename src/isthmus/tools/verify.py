"""Verify: the gate on the machine of the target, with nothing but the bundle; it seals what passes.

`--url` verifies an engine that another process runs: tokens and log-probabilities, which is all that an API shows. With
`--serve-command` it is started here, for the bundle, for each of its slices and for a float bundle of the same weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.engines.local.core.replica import exact_for
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.started import started
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import SEAL, Bundle, architecture_of, read_bundle, read_config
from isthmus.formats.files.sliced import SLICE, read_slice, weights_id
from isthmus.parity.capture import GoldenSet
from isthmus.parity.engine import check_engine, compare_engine
from isthmus.parity.gate import check_summary, declared, judge, refusal, refuses, unmeasured
from isthmus.parity.manifest import check_manifest
from isthmus.parity.sanity import check_sanity
from isthmus.parity.seal import Lineage, read_verdict, write_seal
from isthmus.parity.served import check_served
from isthmus.parity.target import ANNOUNCED, DTYPES
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.twins import ALPHA
from isthmus.parity.verify import Limits, Target, Tell, check_format_cost, verify_bundle, write_verdict
from isthmus.progress import Watch
from isthmus.records import Check, ParityVerdict

BEHIND_A_URL = Check(
    layer="modules",
    name="modules, whole distributions, and what config.json sets",
    outcome="caution",
    detail="were not looked at: the API of an engine shows log-probabilities of tokens and nothing else",
)

SLICES_ALONE = BEHIND_A_URL.model_copy(
    update={"detail": "were looked at through slices, layer by layer, as log-probabilities of tokens"}
)


def execute(
    folder: Path,
    watch: Watch,
    *,
    device: str | None,
    dtype: str | None,
    rehearse: str | None,
    url: str | None,
    api_key: str | None,
    serve_command: str | None = None,
    slices: Path | None = None,
    float_bundle: Path | None = None,
    max_chip_kl: float,
    max_mean_kl: float,
    sign_key: Path | None,
) -> ParityVerdict:
    """Verify, say what was found, write the verdict and seal. Raises GateRefused unless every check passed.

    What an earlier gate refused and this one cannot look at, such as the task of a hand-off, is still refused.
    """
    if dtype is not None and dtype not in DTYPES:
        raise IsthmusError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if (folder / SEAL).exists():
        raise IsthmusError(f"{folder} is sealed already; `isthmus inspect {folder}` shows its seal")
    limits = Limits(max_chip_kl, max_mean_kl, source="isthmus verify")
    behind_an_api = url is not None or serve_command is not None
    if behind_an_api:
        at = EngineAt(url, api_key, serve_command, dtype)
        with watch.count("engines", 1) as counter:
            verdict = verify_engine(folder, at, limits, slices=slices, float_bundle=float_bundle, tell=counter.tell)
    else:
        target = Target(device or default_device(), dtype or "fp32", rehearse)
        watch.say(f"  {folder} on {target}")
        with watch.count("blocks", 1) as counter:
            verdict = verify_bundle(folder, target=target, limits=limits, tell=counter.tell)
    served = check_served(folder, elsewhere=behind_an_api)
    verdict = verdict.model_copy(
        update={
            "verdict": "refuse" if refuses(served) else verdict.verdict,
            "checks": [served, *verdict.checks],
        }
    )
    layers = ("files",) if behind_an_api else ("files", "config", "modules")
    if left := unmeasured(read_verdict(folder), verdict.checks, layers):
        verdict = verdict.model_copy(update={"verdict": "refuse", "checks": [*verdict.checks, *left]})
    watch.console.print(check_summary(f"parity on {verdict.target}: {verdict.verdict}", verdict.checks, str(folder)))
    write_verdict(folder, verdict)
    if verdict.verdict == "refuse":
        opening = f"{folder} is refused, and not sealed."
        raise GateRefused(refusal(opening, verdict.checks, verdict.culprit, verdict.operator))
    seal = write_seal(
        folder, verdict="pass", checks=verdict.checks, lineage=Lineage(target_pool=verdict.target), sign_key=sign_key
    )
    watch.say(f"  sealed as {seal.id}")
    watch.say(f"  chat   isthmus serve {folder}")
    return verdict


@dataclass(frozen=True)
class EngineAt:
    """How an engine is reached: it runs at `url`, or `command` starts one for each bundle.

    `dtype` is its arithmetic; if absent it is taken to be what config.json announces, fp32 of our own engine.
    """

    url: str | None
    api_key: str | None = None
    command: str | None = None
    dtype: str | None = None

    @contextmanager
    def serving(self, bundle: Path) -> Iterator[HttpEngine]:
        """The engine that serves this bundle."""
        if self.command is None:
            assert self.url is not None
            engine = HttpEngine(self.url, self.api_key)
            engine.start(bundle)
            yield engine
            return
        with (
            tempfile.TemporaryDirectory(prefix="isthmus-verify-") as scratch,
            started(self.command, bundle, Path(scratch) / "engine.log", self.url, self.api_key) as engine,
        ):
            yield engine

    def arithmetic(self, engine: HttpEngine, bundle: Bundle) -> str:
        """The name of the dtype in which the engine computes."""
        return self.dtype or engine.arithmetic or ANNOUNCED[get_format(bundle.format).dtype]


def verify_engine(
    folder: Path,
    at: EngineAt,
    limits: Limits | None = None,
    *,
    slices: Path | None = None,
    float_bundle: Path | None = None,
    tell: Tell = lambda what, done, total: None,
) -> ParityVerdict:
    """What an engine says of the golden sequences, against the emulator and healthy twins of this bundle.

    `slices` holds bundles of single layers of it, and `float_bundle` is one of the same weights in a float format,
    which shows all that is not int8: a command that starts the engine for each of them is needed then.
    """
    started_at, limits = time.time(), limits or Limits()
    if (slices or float_bundle) and at.command is None:
        raise IsthmusError(
            "slices and float bundles need an engine each: say with --serve-command how one is started, for example "
            "--serve-command 'vllm serve {bundle} --port {port} --logprobs-mode processed_logprobs'"
        )
    chosen = slices_of(folder, slices) if slices else []
    total, where = 1 + len(chosen) + bool(float_bundle), ""
    golden, vocabulary = GoldenSet(folder), architecture_of(folder, read_config(folder)).vocab_size
    checks = [check_sanity(golden, vocabulary, limits.confidence), check_format_cost(golden, limits)]
    checks += check_manifest(folder)
    with at.serving(folder) as engine:
        found, where = _whole(folder, engine, at, limits)
    checks += [BEHIND_A_URL if not chosen else SLICES_ALONE, *found]
    for done, one in enumerate(chosen, start=1):
        tell("slices", done, total)
        with at.serving(one) as engine:
            checks += _slice(one, folder, engine, at, len(chosen))
    if float_bundle:
        with at.serving(float_bundle) as engine:
            found, _ = _whole(float_bundle, engine, at, limits)
        checks += [one.model_copy(update={"name": f"{float_bundle.name}: {one.name}"}) for one in found]
    return judge(checks, target=where, rehearsed=False, started=started_at)


def slices_of(folder: Path, slices: Path) -> list[Path]:
    """The slices in a folder, in the order of their layers. Raises IsthmusError if they are none of this bundle."""
    found = sorted(
        (path for path in slices.iterdir() if (path / SLICE).is_file()), key=lambda path: read_slice(path).layers
    )
    if not found:
        raise IsthmusError(f"{slices} holds no slices: `isthmus slice {folder} {slices} --each` writes them")
    for path in found:
        if read_slice(path).of != weights_id(folder):
            raise IsthmusError(f"{path} is a slice of other weights than those of {folder}: write the slices again")
    return found


def _whole(folder: Path, engine: HttpEngine, at: EngineAt, limits: Limits) -> tuple[list[Check], str]:
    bundle, golden = read_bundle(folder), GoldenSet(folder)
    arithmetic, sequences = at.arithmetic(engine, bundle), golden.listed.golden_sequences()
    found = compare_engine(
        engine.score,
        bundle.build,
        arithmetic,
        sequences,
        golden.token_logprobs().trained,
        confidence=limits.confidence,
        exact=exact_for(engine.bits, bundle.build, sequences),
    )
    budget = declared(limits.max_chip_kl, "nats/token", limits.source)
    where = f"{engine.server} at {engine.url}, {arithmetic}"
    return check_engine(found, where, budget, "golden sequences scored by"), where


def _slice(folder: Path, whole: Path, engine: HttpEngine, at: EngineAt, count: int) -> list[Check]:
    """One layer, or a few: its own emulator and twins, on golden inputs; so many slices share the size of the test."""
    bundle, one = read_bundle(folder), read_slice(folder)
    golden = [GoldenSequence(row[:1], row[1:]) for row in one.sequences()]
    golden = golden or GoldenSet(whole).listed.golden_sequences()
    arithmetic, exact = at.arithmetic(engine, bundle), exact_for(engine.bits, bundle.build, golden)
    found = compare_engine(engine.score, bundle.build, arithmetic, golden, None, alpha=ALPHA / count, exact=exact)
    where = f"{engine.server}, {arithmetic}"
    checks = check_engine(found, where, None, "sequences of golden inputs scored by")
    return [
        check.model_copy(
            update={
                "name": f"{one.name}: {check.name}",
                "module": one.name if check.outcome != "pass" else None,
            }
        )
        for check in checks
    ]


def default_device() -> str:
    """The accelerator of this machine as torch knows it, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"
