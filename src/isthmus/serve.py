"""Serve: check the seal of a bundle, then put it to work behind an OpenAI-compatible API and a chat page.

A bundle that no parity gate has passed, or that changed since, is refused.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from isthmus import chips
from isthmus.data.tasks import load_task
from isthmus.engines.local.host import bind, run_app
from isthmus.engines.local.server import Server
from isthmus.engines.local.service import Service, load_service
from isthmus.errors import GateRefused, IsthmusError
from isthmus.parity.seal import verify_seal
from isthmus.pools import Pool, default_threads, get_pool
from isthmus.progress import Watch
from isthmus.recipe import ServeSection
from isthmus.records import HandoffRecord, PlanRecord
from isthmus.run import RunFolder

NAME = "serve"
EXAMPLES = 6


@dataclass(frozen=True)
class Serving:
    """How a bundle is served. `seal_id`, if given, is the only seal that is accepted."""

    section: ServeSection = field(default_factory=ServeSection)
    model_name: str | None = None
    seal_id: str | None = None
    pool: str | None = None
    rehearse: str | None = None
    threads: int = field(default_factory=default_threads)
    examples: list[str] = field(default_factory=list)


def execute(run: RunFolder, watch: Watch, host: str | None = None, port: int | None = None) -> None:
    """Serve the sealed bundle of a run until it is interrupted. `host` and `port` override the recipe's.

    Raises GateRefused if the hand-off refused, or if the bundle does not match its seal.
    """
    record = run.require_record("parity", HandoffRecord, "handoff")
    if record.verdict != "pass":
        raise GateRefused(f"the parity gate refused the bundle of {run.path}; its report says why. Nothing is served.")
    plan = run.require_record("plan", PlanRecord, "plan")
    pool = get_pool(run.recipe, plan.pool_of(NAME))
    require_cpu(pool)
    changes = {"host": host, "port": port}
    section = run.recipe.serve.model_copy(update={key: value for key, value in changes.items() if value is not None})
    serving = Serving(
        section=section,
        model_name=run.recipe.name,
        seal_id=record.seal_id,
        pool=pool.name,
        rehearse=pool.chip if pool.rehearsed else None,
        threads=pool.threads,
        examples=example_prompts(run),
    )
    began = time.monotonic()

    def tell_start() -> None:
        run.event(NAME, "start", pool=pool.name, rehearsed=pool.rehearsed, seal=record.seal_id)

    serve_bundle(run.path / record.bundles[record.format], watch, serving, tell_start)
    run.event(NAME, "end", seconds=round(time.monotonic() - began, 3))


def serve_bundle(folder: Path, watch: Watch, serving: Serving, on_ready: Callable[[], None] = lambda: None) -> None:
    """Check the seal of a bundle and serve it in the foreground until SIGTERM or Ctrl-C.

    `on_ready` is called once, when the server answers. Raises IsthmusError if the port is taken or the engine fails.
    """
    section = serving.section
    listener = bind(section.host, section.port, flag="--port")
    try:
        service = open_service(folder, serving)
        port = listener.getsockname()[1]
        app = Server(service, page=True).app()

        def ready() -> None:
            _announce(watch, service, section.host, port)
            on_ready()

        run_app(app, listener, service.core, on_ready=ready)
    finally:
        listener.close()
    if service.core.failure is not None:
        raise IsthmusError(f"the engine failed while it served {folder}: {service.core.failure!r}")


def open_service(folder: Path, serving: Serving) -> Service:
    """The engine of a sealed bundle, ready to be served. Raises GateRefused if the seal does not hold."""
    seal = verify_seal(folder, serving.seal_id)
    service = load_service(
        folder,
        model_name=serving.model_name,
        seal=seal.id,
        pool=serving.pool,
        rehearse=serving.rehearse,
        slots=serving.section.max_batch,
        threads=serving.threads,
    )
    service.default_tokens = serving.section.max_new_tokens
    service.default_temperature = serving.section.temperature
    service.examples = service.examples or serving.examples
    return service


def example_prompts(run: RunFolder) -> list[str]:
    """Held-out problems to try in the chat page, from all over the list."""
    problems = load_task(run.recipe).heldout
    return [problem.prompt for problem in problems[:: max(1, len(problems) // EXAMPLES)][:EXAMPLES]]


def require_cpu(pool: Pool) -> None:
    """Raise IsthmusError for a pool whose chip is here: the local engine computes on the CPU and would not use it."""
    if chips.device_of(pool) != "cpu":
        raise IsthmusError(
            f"the pool {pool.name!r} has real {pool.chip} chips, and `isthmus serve` computes on the CPU. "
            "Serve the bundle there with vLLM (`vllm serve BUNDLE`), which reads it as it is."
        )


def _announce(watch: Watch, service: Service, host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    identity = service.identity
    watch.say(f"  [bold]{identity.model}[/] in {identity.format}, seal {identity.seal}")
    if identity.statement:
        watch.say(f"  {identity.statement}")
    watch.say(f"  chat   {url}/")
    watch.say(f"  API    {url}/v1")
    watch.say("  Ctrl-C stops it. For example:")
    watch.console.print(_curl(url, service.examples), highlight=False, markup=False, soft_wrap=True)


def _curl(url: str, examples: list[str]) -> str:
    body = json.dumps({"messages": [{"role": "user", "content": examples[0] if examples else "Hello"}]})
    return f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
