"""What a vendor's engineer asks about the machine on which something failed, without what is nobody's business."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from isthmus.chips import Vendor
from isthmus.chips.cpu import processor_name

COMMON_VARIABLES = ("OMP_", "MKL_", "GLOO_", "TORCH_", "PYTORCH_", "KMP_", "OPENBLAS_", "MASTER_", "GOMP_")
SECRET = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|(^|_)KEY|KEY$", re.IGNORECASE)
SYSTEM_FOLDERS = ("/usr/", "/opt/", "/lib", "/dev/", "/proc/", "/sys/", "/bin/", "/etc/")
_PATH = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/:\"'<>|,;()\[\]]+/)+[^\s/:\"'<>|,;()\[\]]*")
_ADDRESS = re.compile(r"\b\w+://\S*|\b\S+@\S+\.\S+")


def describe_machine(device: str, vendor: Vendor) -> str:
    """Versions, system, processor, devices, and the environment variables that matter; one `name: value` a line."""
    lines = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "processor": f"{processor_name()}, {os.cpu_count()} logical cores",
        "devices": _devices(device),
        **vendor.versions(),
        **shown_variables(os.environ, vendor.variables),
    }
    told = "\n".join(f"{name}: {value}" for name, value in lines.items())
    config = without_private(torch.__config__.show().strip(), {})
    return f"{told}\n\ntorch's build:\n{config}\n\ntorch's threads:\n{torch.__config__.parallel_info().strip()}\n"


def shown_variables(variables: Mapping[str, str], of_the_vendor: tuple[str, ...]) -> dict[str, str]:
    """The environment variables that torch and the vendor's software read, without secrets and places of a user."""
    wanted = (*COMMON_VARIABLES, *of_the_vendor)
    names = sorted(name for name in variables if name.startswith(wanted) and not SECRET.search(name))
    return {name: _ADDRESS.sub("<address>", without_private(variables[name], variables)) for name in names}


def without_private(text: str, variables: Mapping[str, str]) -> str:
    """A text without folders outside the system's, this machine's name, and the user's name and home folder.

    Of a path the last two parts stay, or what follows `site-packages`.
    """
    home = variables.get("HOME", str(Path.home())).rstrip("/")
    if home:
        text = re.sub(rf"{re.escape(home)}(?![^\s/:\"'])", "~", text)
    text = _PATH.sub(lambda found: _shortened(found.group()), text)
    for name, instead in ((socket.gethostname(), "<host>"), (getpass.getuser(), "<user>")):
        if len(name) > 2 and name not in ("root", "localhost"):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text


def _shortened(path: str) -> str:
    _, packages, after = path.partition("/site-packages/")
    if packages:
        return f"...{packages}{after}"
    if path.startswith(SYSTEM_FOLDERS):
        return path
    return "/".join(["...", *[part for part in path.split("/") if part not in ("", "~")][-2:]])


def _devices(device: str) -> str:
    if device == "cpu":
        return "the CPU"
    module = getattr(torch, device, None)
    if module is None or not module.is_available():
        return f"none of type {device}"
    names = [module.get_device_name(index) for index in range(module.device_count())]
    return f"{len(names)} of type {device}: {', '.join(sorted(set(names)))}"
