"""Follow: take the versions that a run publishes to a shared folder, and bring an engine to each newest one."""

from __future__ import annotations

import time
from pathlib import Path

from isthmus.engines.channel import Channel
from isthmus.engines.remote import HttpEngine
from isthmus.engines.shared_folder import Follower
from isthmus.errors import IsthmusError
from isthmus.progress import Watch

POLL_S = 1.0


def execute(
    folder: Path, watch: Watch, *, url: str, api_key: str | None, bundle: Path, exchange: Path | None, once: bool
) -> None:
    """Follow until interrupted; with `once`, until nothing newer is there. Raises IsthmusError if nothing was there."""
    engine = HttpEngine(url, api_key, exchange=exchange)
    engine.start(bundle)
    follower, channel = Follower(folder), Channel(engine)
    watch.say(f"  {engine.server} at {url} follows {folder}")
    while True:
        skipped = follower.skipped
        if follower.advance():
            if follower.skipped > skipped:
                watch.say(f"  [yellow]{follower.skipped - skipped} versions could not be taken in order[/]")
            if follower.behind:
                continue
            assert follower.version is not None
            sent = channel.send(follower.tensors, follower.version)
            if sent.fallback:
                watch.say(f"  [yellow]the engine refused the delta, and got all tensors:[/] {sent.fallback}")
            watch.say(f"  version {sent.version}, {sent.kind}, {sent.bytes:,} bytes, {sent.send_s:.2f} s")
        elif once:
            if follower.version is None:
                raise IsthmusError(f"{folder} holds no version that can be taken; does a run publish there?")
            return
        else:
            time.sleep(POLL_S)
