"""The scripts of `examples/`, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.flow_recipe import ROOT


def example(script: str, *words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the folder, with the `isthmus` and the `python` of this interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        for name, words_before in (("isthmus", "-m isthmus"), ("python", "")):
            command = Path(folder) / name
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words_before} "$@"\n')
            command.chmod(0o755)
        path = os.pathsep.join((folder, os.environ["PATH"]))
        return subprocess.run(
            ["bash", str(ROOT / "examples" / script), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "COLUMNS": "200", "PATH": path, **environment},
            cwd=ROOT,
        )
