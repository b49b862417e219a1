"""A user's program with modules of Isthmus inside: each Python process of it that imports torch starts them."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import resources
from pathlib import Path

import isthmus
from isthmus.errors import IsthmusError

MODULES = "ISTHMUS_WITH_TORCH"
"""Of the environment: modules whose `start()` the hook calls, with commas between them."""
INTERRUPTED = 130
"""The exit code of a command that the user stopped."""


def program(command: list[str], verb: str) -> list[str]:
    """The command, with this Python in place of a bare `python`: it is the one that has Isthmus.

    Raises IsthmusError, in the words of the verb, for no command and for a program that is not there.
    """
    if not command:
        raise IsthmusError(f"nothing to {verb}: write the command after --, as in `-- python train.py`")
    name, *arguments = command
    if name in ("python", "python3"):
        return [sys.executable, *arguments]
    if name.startswith("-"):
        raise IsthmusError(f"{name} is no option of {verb}; `isthmus {verb} --help` lists them")
    if shutil.which(name) is None:
        raise IsthmusError(f"{name!r} is not a program that can be found; a script is run as `-- python {name}`")
    return command


def environment_with(module: str) -> dict[str, str]:
    """This environment, in which a Python process that loads torch calls `start()` of a module. What an outer command
    starts there is started as well, first."""
    hook = resources.files("isthmus.launch") / "hook"
    paths = [str(hook), *_source_folder(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    modules = [*os.environ.get(MODULES, "").split(","), module]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))),
        MODULES: ",".join(dict.fromkeys(filter(None, modules))),
    }


def _source_folder() -> list[str]:
    """Where Isthmus lies, unless it is installed among other packages, where Python finds it."""
    folder = Path(isthmus.__file__).parents[1]
    return [] if folder.name in ("site-packages", "dist-packages") else [str(folder)]
