"""Serve: check the seal of a bundle, then put it to work behind an OpenAI-compatible API and a chat page.

A bundle that no parity gate has passed, that one has refused, that changed since or that nobody trusted has signed is
refused, unless it is asked for; then every answer, metric and log says what it is.
"""

from __future__ import annotations

import functools
import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus import chips
from isthmus.engines.local import report_kernels
from isthmus.engines.local.api.access_log import AccessLog
from isthmus.engines.local.api.canary import CanaryReport
from isthmus.engines.local.api.host import bind, run_app
from isthmus.engines.local.api.keys import Keyring, check_exposure
from isthmus.engines.local.api.limits import KeyLimits
from isthmus.engines.local.api.memory import use_few_heaps
from isthmus.engines.local.api.server import CanaryPlan, Server
from isthmus.engines.local.api.service import Service, load_service
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats.files.bundle import Bundle, read_bundle
from isthmus.parity.seal import Standing, standing, verify_seal
from isthmus.parity.signing import read_trusted
from isthmus.pools import Pool, default_threads, get_pool
from isthmus.progress import Watch
from isthmus.recipe.read import override_serve
from isthmus.recipe.schema import ServeSection
from isthmus.records import HandoffRecord, PlanRecord
from isthmus.run import RunFolder
from isthmus.tasks import interleaved, tasks_of

NAME = "serve"
EXAMPLES = 6
WARNINGS: dict[str, str] = {
    "unsealed": "no parity gate has passed {}",
    "untrusted": "nobody who is trusted has signed the seal of {}",
    "tampered": "{} is not what was sealed",
    "refused": "a parity gate has refused {}",
}


def _untold(_event: str, **_fields: Any) -> None:
    """Where there is no run whose events could tell it."""


@dataclass(frozen=True)
class Serving:
    """How a bundle is served. `seal_id`, if given, is the only seal that is accepted. `refused`: its hand-off was.

    `access_log` is where the log goes if the section does not say, None for nowhere; `unlogged` then says why, if it is
    not meant so. `report` is the dossier of the run.
    `tell` records events, as RunFolder.event does.
    """

    section: ServeSection = field(default_factory=ServeSection)
    model_name: str | None = None
    seal_id: str | None = None
    refused: bool = False
    pool: str | None = None
    rehearse: str | None = None
    threads: int = field(default_factory=default_threads)
    examples: list[str] = field(default_factory=list)
    access_log: Path | None = None
    unlogged: str | None = None
    report: Path | None = None
    tell: Callable[..., None] = _untold


def execute(run: RunFolder, watch: Watch, overrides: tuple[str, ...] = (), **changes: Any) -> None:
    """Serve the sealed bundle of a run until it is interrupted. `overrides` and `changes` are other keys of [serve].

    Raises GateRefused if the hand-off refused, or if the bundle does not match its seal.
    """
    section = override_serve(run.recipe.serve, overrides, **changes)
    record = run.require_record("parity", HandoffRecord, "handoff")
    if record.verdict != "pass" and not section.allow_unsealed:
        raise GateRefused(f"the parity gate refused the bundle of {run.path}; its report says why. Nothing is served.")
    plan = run.require_record("plan", PlanRecord, "plan")
    pool = get_pool(run.recipe, plan.pool_of(NAME))
    require_cpu(pool)
    unlogged = None if run.is_writable else f"{run.path} cannot be written; --access-log FILE writes one elsewhere"
    if unlogged:
        watch.say(f"  [yellow]{run.path} cannot be written: what happens here is not among the run's events[/]")
    serving = Serving(
        section=section,
        model_name=run.recipe.name,
        seal_id=record.seal_id,
        refused=record.verdict != "pass",
        pool=pool.name,
        rehearse=pool.chip if pool.rehearsed else None,
        threads=pool.threads,
        examples=example_prompts(run),
        access_log=None if unlogged else run.path / NAME / "access.jsonl",
        unlogged=unlogged,
        report=run.path / "report.html",
        tell=_untold if unlogged else functools.partial(run.event, NAME),
    )
    began = time.monotonic()

    def tell_start() -> None:
        serving.tell("start", pool=pool.name, rehearsed=pool.rehearsed, seal=record.seal_id)

    serve_bundle(run.path / record.bundles[record.format], watch, serving, tell_start)
    serving.tell("end", seconds=round(time.monotonic() - began, 3))


def execute_bundle(folder: Path, watch: Watch, overrides: tuple[str, ...] = (), **changes: Any) -> None:
    """Serve a sealed bundle that has no run folder here, until it is interrupted."""
    serve_bundle(folder, watch, Serving(section=override_serve(ServeSection(), overrides, **changes)))


def serve_bundle(folder: Path, watch: Watch, serving: Serving, on_ready: Callable[[], None] = lambda: None) -> None:
    """Check the seal of a bundle and serve it in the foreground until SIGTERM or Ctrl-C.

    `on_ready` is called once, when the server answers. Raises IsthmusError if the port is taken or the engine fails.
    """
    section = serving.section
    use_few_heaps()
    keys = Keyring.load(section.key_file)
    check_exposure(section.host, keys, section.allow_open)
    listener = bind(section.host, section.port, flag="--port")
    try:
        service = open_service(folder, serving)
        port = listener.getsockname()[1]
        server = open_server(folder, service, serving, keys, watch)

        def ready() -> None:
            _announce(watch, service, section.host, port, has_keys=keys.has_users)
            report_kernels(serving.tell, service.core.kernels)
            on_ready()

        def drain(running: int) -> None:
            waits = f"{running} requests run and have {section.drain_seconds:g} s to end; Ctrl-C again ends them now"
            watch.say(f"  stopping: {waits if running else 'nothing runs'}")

        run_app(server, listener, on_ready=ready, drain_s=section.drain_seconds, on_drain=drain)
        watch.say(f"  stopped. The bundle is as it was; to serve it again: isthmus serve {folder}")
    finally:
        listener.close()
    if service.core.failure is not None:
        raise IsthmusError(f"the engine failed while it served {folder}: {service.core.failure!r}")


def open_service(folder: Path, serving: Serving) -> Service:
    """The engine of a sealed bundle, ready to be served. Raises GateRefused if no seal that is trusted vouches for it.

    With `allow_unsealed` any bundle is taken that can be read; its state is in the service's identity.
    """
    section = serving.section
    found = _standing(folder, serving)
    if found.state != "sealed" and not section.allow_unsealed:
        raise GateRefused(found.reason)
    seal = found.seal if found.state == "sealed" else None
    service = load_service(
        folder,
        model_name=next(iter(section.served_model_name), serving.model_name),
        seal=seal.id if seal else None,
        pool=serving.pool,
        rehearse=serving.rehearse,
        slots=section.max_batch,
        threads=serving.threads,
        options=section,
        state=found.state,
        signer=found.seal.signer if found.seal else None,
        thinking=section.thinking,
    )
    service.seal_checks = _outcomes(found.seal.checks) if found.seal else {}
    service.other_names = tuple(section.served_model_name[1:])
    service.default_tokens = section.max_new_tokens
    service.default_temperature = section.temperature
    service.max_waiting = section.max_waiting
    service.max_waiting_tokens = section.max_waiting_tokens
    service.examples = service.examples or serving.examples
    return service


def _outcomes(checks: Mapping[str, str]) -> Counter[str]:
    """How many checks of a seal, each of which begins with its outcome and a colon, came out how."""
    return Counter(said.partition(":")[0] for said in checks.values())


def _standing(folder: Path, serving: Serving) -> Standing:
    trusted = serving.section.trusted_keys
    return standing(folder, serving.seal_id, read_trusted(trusted) if trusted else None, refused=serving.refused)


def open_server(folder: Path, service: Service, serving: Serving, keys: Keyring, watch: Watch) -> Server:
    """The routes around a service, with limits, log and canaries as its section says."""
    section = serving.section
    target = serving.access_log if section.access_log is None else section.access_log
    log = AccessLog(
        None if target == "none" else target, file_bytes=section.access_log_mib << 20, log_prompts=section.log_prompts
    )
    if target is None and serving.unlogged:
        log.failure = f"nothing is logged: {serving.unlogged}"
        watch.say(f"  [yellow]{log.failure}[/]")
    limits = KeyLimits(section.requests_per_minute, section.tokens_per_minute, section.concurrent_requests)
    canary = _canary(folder, service, serving, watch)
    if service.identity.seal is None:
        state = service.identity.state
        warning = f"{WARNINGS[state].format(folder)}: what it answers is nobody's promise"
        watch.say(f"  [bold red]{state.upper()}[/] {warning}")
        log.event(state, reason=warning)
        serving.tell(state, reason=warning)
    hosts = (section.host, *section.allowed_hosts)
    options: dict[str, Any] = {"keys": keys, "limits": limits, "log": log, "canary": canary, "report": serving.report}
    return Server(service, page=True, origins=section.allow_origins, hosts=hosts, **options)


def _canary(folder: Path, service: Service, serving: Serving, watch: Watch) -> CanaryPlan | None:
    """When and how this server checks itself. Raises IsthmusError if a rollback is asked for that could not be done."""
    section, seal = serving.section, service.identity.seal
    rolls_back = section.on_drift == "rollback"
    if rolls_back and (service.golden is None or seal is None):
        lacks = "golden answers" if service.golden is None else "seal"
        raise IsthmusError(
            f"on_drift = rollback needs a sealed bundle with golden answers, and {folder} has no {lacks}. "
            "Repeat `isthmus handoff`, or use on_drift = alarm."
        )
    if service.golden is None:
        why = f"{folder} has no golden answers, so no canary can run; `isthmus handoff` writes them"
        watch.say(f"  [yellow]{why}[/]")
        serving.tell("fallback", what="live canaries", why=why)
        return None

    def sealed_bundle() -> Bundle:
        verify_seal(folder, seal)
        return read_bundle(folder)

    def tell(report: CanaryReport) -> None:
        if report.outcome in ("drift", "failed") or report.rolled_back:
            watch.say(f"  [bold red]canary[/] {report.outcome}: {report.reason}")
            serving.tell("canary", **report.shown())

    every_s = section.canary_minutes * 60 if section.canary_minutes else None
    return CanaryPlan(every_s, section.canary_bound, sealed_bundle if rolls_back else None, tell)


def example_prompts(run: RunFolder) -> list[str]:
    """Held-out problems to try in the chat page, from all over the list."""
    heldout = tasks_of(run.recipe, run.recipe.handed_off).heldout
    problems = interleaved(heldout, sum(map(len, heldout.values())))
    return [problem.prompt for problem in problems[:: max(1, len(problems) // EXAMPLES)][:EXAMPLES]]


def require_cpu(pool: Pool) -> None:
    """Raise IsthmusError for a pool whose chip is here: the local engine computes on the CPU and would not use it."""
    if chips.device_of(pool) != "cpu":
        raise IsthmusError(
            f"the pool {pool.name!r} has real {pool.chip} chips, and `isthmus serve` computes on the CPU. "
            "Serve the bundle there with vLLM (`vllm serve BUNDLE`), which reads it as it is."
        )


def _announce(watch: Watch, service: Service, host: str, port: int, *, has_keys: bool) -> None:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    identity = service.identity
    seal = f"seal {identity.seal}" if identity.seal else identity.state
    watch.say(f"  [bold]{identity.model}[/] in {identity.format}, {seal}")
    if identity.statement:
        watch.say(f"  {identity.statement}")
    if service.core.kernels != "native":
        watch.say(f"  kernels {service.core.kernels}")
    watch.say(f"  chat   {url}/")
    watch.say(f"  API    {url}/v1")
    watch.say("  Ctrl-C lets running requests end, then stops it. For example:")
    watch.console.print(_curl(url, service.examples, has_keys), highlight=False, markup=False, soft_wrap=True)


def _curl(url: str, examples: list[str], has_keys: bool) -> str:
    body = json.dumps({"messages": [{"role": "user", "content": examples[0] if examples else "Hello"}]})
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    return f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
