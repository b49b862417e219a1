"""The engines of a pool that someone else started: found out, refused with the command that starts them well, or used.

Nothing is assumed of them: each is asked what it is, whether it tells the log-probabilities of what it samples, and
whether weights can be brought to it. That it serves a model of the right kind shows where it tells what it has.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from isthmus.chips import get_chip, vendor_of
from isthmus.engines import Engine, EngineError
from isthmus.engines.fleet import Fleet
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.prepared import Prepared
from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import CONFIG
from isthmus.pools import Pool
from isthmus.recipe.steps import LossSection
from isthmus.run import new_folder

START_WAIT_S = 10.0
COMMANDS = {
    "vllm": "VLLM_SERVER_DEV_MODE=1 vllm serve {bundle} --port {port} --logprobs-mode processed_logprobs",
    "sglang": "python -m sglang.launch_server --model-path {bundle} --port {port} --enable-deterministic-inference",
    "local": "ISTHMUS_ADMIN_KEY=$(cat {key}) python -m isthmus.engines.local --bundle {bundle} --port {port} --admin",
}
"""How an engine of a make is started so that it can generate for reinforcement learning."""
PLUG_IN = (
    "  vllm takes weights over HTTP, those of experts too, with our plug-in: pip install ./plugin there, and add "
    '--weight-transfer-config \'{"backend": "isthmus"}\''
)


def open_fleet(pool: Pool, bundle: Path, form: str, tell: Callable[..., None], *, routes: bool = False) -> Fleet:
    """The engines of a pool elsewhere, which serve weights of their own until some are brought.

    `bundle` has the model that they must serve, in the format `form`. Raises EngineError if one of them cannot take
    part, with the commands that start one that can, which tells the experts of tokens if `routes` is set; IsthmusError
    for a key or an exchange folder that is not there.
    """
    key, served = _key_of(pool), _bundle_to_serve(pool, bundle)
    prepared = Prepared()
    engines = [_engine(pool, url, key, number, prepared) for number, url in enumerate(pool.engines)]
    fleet = Fleet(engines, tell)
    try:
        fleet.start(bundle)
        for engine in engines:
            engine.check_exchange(form)
    except EngineError as error:
        raise unfit(pool, error, served, routes=routes) from None
    tell("engines", engines=[f"{engine.url}: {engine.server}" for engine in engines])
    return fleet


def check_telling(step: str, loss: LossSection, engine: Engine) -> None:
    """Raise EngineError if an engine cannot tell what the loss of a step wants to know of its samples."""
    if loss.router_replay and (names := engine.cannot_tell_routes):
        raise EngineError(
            f"step.{step}.loss.router_replay wants to know the experts of each token, which {' and '.join(names)} "
            "cannot tell; generate with engines of isthmus that were started with --record-routes, or write "
            "loss.router_replay = false"
        )
    if loss.keep_sampling_mask and (names := engine.cannot_tell_kept):
        raise EngineError(
            f"step.{step}.loss.keep_sampling_mask wants to know the tokens that each draw was made among, for which "
            f"{' and '.join(names)} cannot be asked; generate with engines of isthmus, or sample from the whole "
            "distribution: leave out top_p, top_k, min_p and loss.keep_sampling_mask"
        )


def unfit(pool: Pool, error: EngineError, bundle: Path, *, routes: bool = False) -> EngineError:
    """What an engine of the pool lacks, with how one is started that does not, on a bundle of the right kind."""
    return EngineError(f"the pool {pool.name!r} cannot generate: {error}\n{how_to_start(pool, bundle, routes=routes)}")


def how_to_start(pool: Pool, bundle: Path, *, routes: bool = False) -> str:
    """The commands for the engines that a chip has, a line each; with `routes` of those that tell experts."""
    key = pool.api_key_file or Path("KEY_FILE")
    makes = [] if routes else [name for name in get_chip(pool.chip).engines or () if name != "local"]
    own = {**vendor_of(pool.chip).serving, **({"local": "--record-routes"} if routes else {})}
    lines = [f"Start one of these on {pool.name} ({pool.chip}), for each of its URLs with the port of that URL:"]
    for name in [*makes, "local"]:
        command = COMMANDS.get(name) or COMMANDS.get(name.partition("-")[0])
        if command is not None:
            filled = command.format(bundle=shlex.quote(str(bundle)), port="PORT", key=shlex.quote(str(key)))
            lines.append(f"  {name}: {' '.join(filter(None, [filled, own.get(name, '')]))}")
    if any(name.partition("-")[0] == "vllm" for name in makes):
        lines.append(PLUG_IN)
    where = "It lies in the exchange folder" if pool.exchange else "Copy this folder to them"
    lines.append(f"{where}: {bundle} has a model of the right kind; each version is brought before it generates.")
    return "\n".join(lines)


def _engine(pool: Pool, url: str, key: str | None, number: int, prepared: Prepared) -> HttpEngine:
    exchange = None if pool.exchange is None else pool.exchange / f"engine-{number}"
    return HttpEngine(url, key, exchange=exchange, start_wait_s=START_WAIT_S, prepared=prepared)


def _key_of(pool: Pool) -> str | None:
    if pool.api_key_file is None:
        return None
    try:
        key = pool.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise IsthmusError(f"pools.{pool.name}.api_key_file cannot be read: {error}") from None
    if not key or len(key.split()) > 1:
        raise IsthmusError(f"{pool.api_key_file} must hold the key of the engines of {pool.name!r}, and nothing else")
    if not (key.isascii() and key.isprintable()):
        raise IsthmusError(
            f"the key in {pool.api_key_file} has signs that no HTTP header carries; write letters, digits and "
            "punctuation of ASCII alone, as plain UTF-8 without a byte order mark"
        )
    return key


def _bundle_to_serve(pool: Pool, bundle: Path) -> Path:
    """Where the engines find a model of the right kind to start with; written into the exchange folder once."""
    if pool.exchange is None:
        return bundle
    if not pool.exchange.is_dir():
        raise IsthmusError(
            f"pools.{pool.name}.exchange = {str(pool.exchange)!r} is no folder here; mount the storage that the "
            "engines and this machine share, under the same path on both"
        )
    kind = hashlib.sha256((bundle / CONFIG).read_bytes()).hexdigest()[:8]
    served = pool.exchange / f"start-{kind}"
    if not served.exists():
        with new_folder(served) as new:
            shutil.copytree(bundle, new, dirs_exist_ok=True)
    return served
