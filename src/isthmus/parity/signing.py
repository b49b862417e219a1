"""Ed25519 keys (RFC 8032) for seals: who vouches for a bundle.

A private key is a PEM file that only its owner may read. A public key is written `ed25519:` and 64 hexadecimal digits.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from isthmus.errors import IsthmusError
from isthmus.lines import lines_of, read_bytes, read_text
from isthmus.run import explain_io_errors

_PUBLIC = re.compile(r"ed25519:[0-9a-f]{64}")
_PREFIX = "ed25519:"


def new_key(path: Path) -> str:
    """Write a new private key to `path`, readable by its owner alone. Returns the public key.

    Raises IsthmusError if there is a file already: a key that is lost cannot be made again.
    """
    key = Ed25519PrivateKey.generate()
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    content = key.private_bytes(encoding, form, serialization.NoEncryption())
    with explain_io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise IsthmusError(f"{path} exists, and a key is never written over; name another file") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    return _public(key)


def public_key(path: Path) -> str:
    """The public key that belongs to a private key file."""
    return _public(load_key(path))


def sign(path: Path, message: bytes) -> str:
    """The signature of a message by the private key in a file, hexadecimal."""
    return load_key(path).sign(message).hex()


def is_signed(public: str, signature: str, message: bytes) -> bool:
    """Whether `signature` is that of `message` by the owner of a public key. Malformed ones are not."""
    if not _PUBLIC.fullmatch(public):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public.removeprefix(_PREFIX)))
        key.verify(bytes.fromhex(signature), message)
    except (ValueError, InvalidSignature):
        return False
    return True


def read_trusted(path: Path) -> list[str]:
    """The public keys of a file: one per line, what follows it on the line is a remark, as is a line with `#`.

    Raises IsthmusError if a line holds no key, or if there is none.
    """
    with explain_io_errors(path):
        try:
            lines = lines_of(read_text(path))
        except FileNotFoundError:
            raise IsthmusError(f"there is no file of trusted keys at {path}") from None
    words = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for word in words:
        check_public(word, str(path))
    if not words:
        raise IsthmusError(f"{path} holds no public key, so nothing could be trusted; `isthmus key new` prints one")
    return words


def check_public(key: str, where: str) -> None:
    """Raise IsthmusError unless this is a public key; `where` says who wrote it."""
    if not _PUBLIC.fullmatch(key):
        raise IsthmusError(f"{where}: {key!r} is no public key; one is `ed25519:` and 64 hexadecimal digits")


def load_key(path: Path) -> Ed25519PrivateKey:
    with explain_io_errors(path):
        try:
            mode, content = path.stat().st_mode, read_bytes(path)
        except FileNotFoundError:
            raise IsthmusError(f"there is no key at {path}; `isthmus key new {path}` makes one") from None
    if stat.S_IMODE(mode) & 0o077:
        raise IsthmusError(f"others may read the private key {path}: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise IsthmusError(f"{path} is no private key: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise IsthmusError(f"{path} is a private key of another kind; seals are signed with Ed25519")
    return key


def _public(key: Ed25519PrivateKey) -> str:
    return _PREFIX + key.public_key().public_bytes_raw().hex()
