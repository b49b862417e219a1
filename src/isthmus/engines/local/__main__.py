"""The process of a local engine: python -m isthmus.engines.local --bundle DIR --port N

It prints one JSON line with its URL when it is ready, and ends when its standard input closes if --follow-stdin is
given: a trainer that is killed leaves no engine behind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from pathlib import Path

from isthmus.engines.local.api.host import bind, run_app
from isthmus.engines.local.api.keys import ADMIN_KEY, API_KEYS, Keyring, check_exposure
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import load_service
from isthmus.engines.local.core.options import add_flags, read_flags
from isthmus.errors import IsthmusError


def main(arguments: list[str] | None = None) -> int:
    """Run the engine until it is told to stop. Returns the exit code."""
    options = command_parser().parse_args(arguments)
    if options.follow_stdin:
        threading.Thread(target=_exit_with_stdin, daemon=True).start()
    try:
        return _serve(options)
    except IsthmusError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _serve(options: argparse.Namespace) -> int:
    keys = Keyring.load(environment={name: os.environ.get(name, "") for name in _key_variables(options.admin)})
    if options.admin and not keys.has_admin:
        raise IsthmusError(f"--admin lets a client exchange the weights, so it needs a key in ${ADMIN_KEY}")
    check_exposure(options.host, keys, options.allow_open)
    listener = bind(options.host, options.port, flag="--port")
    service = load_service(
        options.bundle,
        model_name=options.model_name,
        rehearse=options.rehearse,
        slots=options.slots,
        threads=options.threads,
        options=read_flags(options),
    )
    server = Server(service, keys=keys, hosts=(options.host, *options.allowed_host))
    url = f"http://{options.host}:{listener.getsockname()[1]}"
    ready = {"url": url, "model": service.identity.model, "format": service.identity.format, "pid": os.getpid()}
    ready["kernels"] = service.core.kernels
    run_app(server, listener, on_ready=lambda: print(json.dumps(ready), flush=True), drain_s=options.drain_seconds)
    return 0 if service.core.failure is None else 1


def _key_variables(admin: bool) -> list[str]:
    return [API_KEYS, ADMIN_KEY] if admin else [API_KEYS]


def _exit_with_stdin() -> None:
    """The other end of the pipe is held by the parent alone: it closes when the parent dies, however it dies."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m isthmus.engines.local", description="Serve a bundle over HTTP.")
    parser.add_argument("--bundle", type=Path, required=True, help="folder written by the hand-off")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--threads", type=int, default=1, help="compute threads")
    parser.add_argument("--slots", type=int, default=256, help="samples that run at the same time")
    add_flags(parser)
    parser.add_argument("--model-name", help="name in the API; the folder's name if absent")
    parser.add_argument("--rehearse", metavar="CHIP", help="refuse to start unless the rules of this chip allow it")
    parser.add_argument("--admin", action="store_true", help=f"allow weight updates to the bearer of ${ADMIN_KEY}")
    parser.add_argument("--allow-open", action="store_true", help="listen beyond this machine without user keys")
    parser.add_argument("--allowed-host", action="append", default=[], help="name to answer to without user keys")
    parser.add_argument("--drain-seconds", type=float, default=5.0, help="what running requests get after SIGTERM")
    parser.add_argument("--follow-stdin", action="store_true", help="exit when standard input closes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
