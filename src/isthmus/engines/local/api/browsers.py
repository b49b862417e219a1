"""What a server has to know of browsers: pages of which other origins may ask it, and under which names it answers.

A page of anyone can have a name of its own resolve to this machine and then ask a server here that has no keys ("DNS
rebinding"). The name stands in the Host header; an address in it cannot be someone else's.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from isthmus.engines.local.api.protocol import ApiError

_BUDGETS = [f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")]
_SHOWN = ["Retry-After", "X-Request-Id", *_BUDGETS]


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """The middleware that lets pages of these origins ask; `*` stands for all. None are needed for the server's own."""
    if not origins:
        return []
    options = {"allow_origins": list(origins), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
    return [Middleware(CORSMiddleware, expose_headers=_SHOWN, **options)]


def check_host(header: str | None, names: Collection[str]) -> None:
    """Raise ApiError (403) unless the Host is an address, a name of this machine, or one of `names`."""
    name = _name_in(header or "")
    if not name or _is_address(name) or name == "localhost" or name.endswith(".localhost"):
        return
    if name in {one.lower() for one in (*names, socket.gethostname())}:
        return
    raise ApiError(
        f"this server has no API keys, so it does not answer under the name {name!r}, which may be anyone's: use its "
        "address, start it with keys, or list the name in [serve] allowed_hosts",
        status=403,
        code="host_not_allowed",
    )


def _name_in(header: str) -> str:
    try:
        return (urlsplit(f"//{header.strip()}").hostname or "").rstrip(".")
    except ValueError:
        return header


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
