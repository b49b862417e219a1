"""Looking for devices through a torch device module. Loads nothing until it is called."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus.chips._facts import Found, Presence


def devices_of(module: Any, vendor: str, device: str, patterns: Sequence[tuple[str, str]], mine: str = "") -> Presence:
    """The devices behind `module`, a namespace such as torch.cuda, whose names match the expression `mine`.

    `patterns` are (expression, chip) pairs; the first that is found in a device's name says which chip it is.
    """
    names = [(index, module.get_device_name(index)) for index in range(module.device_count())]
    return Presence(
        tuple(
            Found(vendor, match_name(name, patterns), name, f"{device}:{index}")
            for index, name in names
            if re.search(mine, name)
        )
    )


def devices_of_extension(
    package: str, device: str, vendor: str, device_file: str, patterns: Sequence[tuple[str, str]]
) -> Presence:
    """The devices of a torch extension `package`, in its namespace `device`."""
    if importlib.util.find_spec(package) is None:
        return absent(vendor, device_file, f"{package} is not installed")
    try:
        module = getattr(importlib.import_module(package), device)
    except (ImportError, OSError, RuntimeError) as error:
        return Presence(problems=(f"{package} is installed but cannot be loaded: {error}",))
    if not module.is_available():
        return absent(vendor, device_file, f"{package}.{device}.is_available() is false: check the driver")
    return devices_of(module, vendor, device, patterns)


def match_name(name: str, patterns: Sequence[tuple[str, str]]) -> str | None:
    """The chip whose expression is found first in a device's name; None if none is."""
    return next((chip for expression, chip in patterns if re.search(expression, name)), None)


def absent(vendor: str, device_file: str, reason: str) -> Presence:
    """Nothing usable. A device file that is there all the same is a problem worth telling."""
    if not Path(device_file).exists():
        return Presence()
    return Presence(problems=(f"{device_file} is there, so a {vendor} device may be, but {reason}",))
