"""Who may use a server: keys of users and of its administrator, and what each route asks for.

Keys come from the environment or from a file that only its owner can read, never from the command line, which other
users of a machine can see.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from isthmus.engines.local.api.protocol import ApiError
from isthmus.errors import IsthmusError
from isthmus.lines import lines_of, read_text

API_KEYS, ADMIN_KEY = "ISTHMUS_API_KEYS", "ISTHMUS_ADMIN_KEY"
ADMIN = "admin"
ANYONE = "anyone"


class Level(IntEnum):
    """What a route asks for. A higher level includes the lower ones."""

    PUBLIC = 0
    USER = 1
    ADMIN = 2


@dataclass(frozen=True)
class Key:
    """A known key: the name that logs and limits use, what it opens, and its SHA-256."""

    name: str
    level: Level
    digest: bytes

    @classmethod
    def of(cls, name: str, secret: str) -> Key:
        """The key `admin` opens everything, all others what users need. Raises IsthmusError for an odd secret."""
        if not secret.isascii() or not secret.isprintable() or " " in secret:
            raise IsthmusError(f"the key {name!r} must be printable ASCII without spaces: it travels in a header")
        return cls(name, Level.ADMIN if name == ADMIN else Level.USER, _digest(secret))


class Keyring:
    """All keys of a server. Without user keys the routes of users are open."""

    def __init__(self, keys: list[Key]):
        for what, values in (("name", [key.name for key in keys]), ("key", [key.digest.hex() for key in keys])):
            if len(set(values)) < len(values):
                repeated = next(value for value in values if values.count(value) > 1)
                shown = f": {repeated!r}" if what == "name" else ""
                raise IsthmusError(f"two of the API keys have the same {what}{shown}")
        self.keys = keys

    @classmethod
    def load(cls, file: Path | None = None, environment: Mapping[str, str] = os.environ) -> Keyring:
        """The keys of a file and of the environment together. Raises IsthmusError that says what is wrong with them."""
        keys = _parse(read_text(file), str(file)) if file and _is_private(file) else []
        keys += _parse(environment.get(API_KEYS, "").replace(",", "\n"), f"${API_KEYS}")
        if secret := environment.get(ADMIN_KEY):
            keys.append(Key.of(ADMIN, secret))
        return cls(keys)

    @property
    def has_users(self) -> bool:
        """Whether users need a key."""
        return any(key.level == Level.USER for key in self.keys)

    @property
    def has_admin(self) -> bool:
        return any(key.level == Level.ADMIN for key in self.keys)

    def admit(self, authorization: str, level: Level) -> Key | None:
        """The key of an Authorization header, None where none is needed. Raises ApiError: 401 or 403.

        Every known key is compared, each in constant time.
        """
        scheme, _, secret = authorization.partition(" ")
        given = _digest(secret.strip()) if scheme.lower() == "bearer" else b""
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, given):
                found = key
        if level == Level.PUBLIC or (level == Level.USER and not self.has_users):
            return found
        if found is None:
            raise ApiError(_explain_missing(authorization, level), status=401, code="invalid_api_key")
        if found.level < level:
            raise ApiError(f"the key {found.name!r} may not use this route", status=403, code="admin_key_required")
        return found


def _explain_missing(authorization: str, level: Level) -> str:
    """Never with the key itself: an error is logged and shown."""
    what = "the admin key" if level == Level.ADMIN else "an API key"
    scheme, _, secret = authorization.partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return f"Incorrect API key provided: this server does not know it, and this route needs {what}"
    if authorization:
        return f"this route needs {what} as `Authorization: Bearer KEY`, and the header has another form"
    return f"this route needs {what}: send the header Authorization: Bearer KEY"


def check_exposure(host: str, keys: Keyring, allow_open: bool) -> None:
    """Raise IsthmusError if a server without user keys would listen where other machines reach it."""
    if keys.has_users or allow_open or _is_loopback(host):
        return
    raise IsthmusError(
        f"without API keys everyone who reaches {host} could use this server. Put keys into ${API_KEYS} or into a "
        "file (--key-file), listen on 127.0.0.1, or say --allow-open if that is what you want."
    )


def _parse(text: str, origin: str) -> list[Key]:
    """One `name key` per line; a key alone is named by its number. Lines that begin with # are left out."""
    lines = [line.split() for line in lines_of(text) if line.strip() and not line.strip().startswith("#")]
    keys = []
    for number, words in enumerate(lines, start=1):
        if len(words) > 2:
            raise IsthmusError(f"{origin}: entry {number} has {len(words)} words; write `name key`")
        name = words[0] if len(words) == 2 else f"key{number}"
        try:
            keys.append(Key.of(name, words[-1]))
        except IsthmusError as error:
            raise IsthmusError(f"{origin}: {error}") from None
    return keys


def _is_private(file: Path) -> bool:
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise IsthmusError(f"the key file {file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise IsthmusError(f"the key file {file} is not a file")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise IsthmusError(f"others than its owner may use the key file {file}. Close it: chmod 600 {file}")
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
