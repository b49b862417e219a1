"""Files that are touched: one random fault at a time."""

from __future__ import annotations

import random
from pathlib import Path


def plant(chance: random.Random, files: list[Path]) -> tuple[str, list[Path]]:
    """One fault in one file, or two that change places; returns what was done, and to which."""
    path = chance.choice(files)
    content, kind = path.read_bytes(), chance.choice(["bit", "cut", "edit", "delete", "swap"])
    if kind == "bit":
        at = chance.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "edit":
        at = chance.randrange(len(content))
        old = content[at : at + 1]
        path.write_bytes(content[:at] + (b"8" if old != b"8" else b"9") + content[at + 1 :])
    elif kind == "delete":
        path.unlink()
    else:
        other = chance.choice([one for one in files if one.read_bytes() != content])
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return kind, [path, other]
    return kind, [path]
