"""How much memory each tool of a crossing takes, as a person calls it, on a real model.

    python -m benchmarks.tool_memory                       # SmolLM2-135M: a quarter of an hour on two cores
    python -m benchmarks.tool_memory --quick               # convert alone, and no result is stored

The model is SmolLM2-135M-Instruct in bf16 (tests/support/real_model.py). Each command is a process of its own with one
thread; beside it stands the largest memory of that process and of those that it starts, one by one (ru_maxrss of wait4,
with the interpreter, torch and mapped files). `serve` answers one chat of 64 tokens before it is stopped. `help` reads
no model: it is what each of them takes at least. Memory does not depend on what else the machine does; seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.conditions import store
from isthmus.formats.files.published import weight_files
from tests.support.real_model import real_checkpoint

PORT = 18_790
PATIENCE_S = 900.0
FORM = "w8a8"
WORDS = Path(__file__).parents[1] / "tests" / "real" / "answers.jsonl"
"""Answers that the model gave, as tokens with their questions."""
QUESTION = "Write two sentences about a bridge between two shores."


def command(words: list[str]) -> tuple[subprocess.Popen[bytes], float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    return subprocess.Popen(
        [sys.executable, "-m", "isthmus", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ), began


def ended(process: subprocess.Popen[bytes], began: float) -> dict[str, Any]:
    """Code, seconds and the largest memory in MiB of a process, once it has ended."""
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    kept = {"code": process.returncode, "seconds": time.monotonic() - began, "peak_mib": usage.ru_maxrss / 1024}
    return kept if process.returncode in (0, -signal.SIGTERM) else {**kept, "said": said[-500:]}


def served(bundle: Path) -> dict[str, Any]:
    process, began = command(["serve", str(bundle), "--port", str(PORT), "--access-log", "none", "--allow-unsealed"])
    base, deadline = f"http://127.0.0.1:{PORT}", began + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{base}/health")
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    asked = {"model": bundle.name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}
    question = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(question, timeout=PATIENCE_S).read()
    process.send_signal(signal.SIGTERM)
    return ended(process, began)


def measure(source: Path, folder: Path, quick: bool) -> dict[str, dict[str, Any]]:
    prompts = folder / "prompts.jsonl"
    own = [{"tokens": json.loads(line)["tokens"]} for line in WORDS.read_text(encoding="utf-8").splitlines()]
    prompts.write_text("".join(json.dumps(one) + "\n" for one in own))
    bundle, handed = folder / "bundle", folder / "handed"
    steps = {
        "help": ["--help"],
        "convert": ["convert", str(source), str(bundle), "--format", FORM],
        "capture": ["capture", str(bundle), "--source", str(source), "--prompts", str(prompts)],
        "verify": ["verify", str(bundle), "--device", "cpu"],
        "handoff": ["handoff", str(source), "--format", FORM, "--out", str(handed), "--prompts", str(prompts)],
    }
    found = {}
    for name, words in list(steps.items())[: 2 if quick else None]:
        found[name] = ended(*command(words))
        print(name, found[name], flush=True)
    if not quick:
        found["serve"] = served(bundle)
        print("serve", found["serve"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    source = real_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(source, Path(folder), quick)
    if not quick:
        weights = sum(path.stat().st_size for path in weight_files(source))
        store("tool_memory", {"model": source.name, "weights_mib": weights / 2**20, "format": FORM, "tools": found})


if __name__ == "__main__":
    main()
