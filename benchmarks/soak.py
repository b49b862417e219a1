"""Thousands of requests of all kinds against one server process, and what must be left of them: nothing.

    OMP_NUM_THREADS=1 python -m benchmarks.soak [--requests 10000]

A small bundle with random weights is served by `isthmus serve` with a cache that is too small for its batch, a short
line and a limit per key. Clients send random requests, and some leave early. An administrator exchanges the weights,
pauses, and sends updates that are damaged. A fixed probe is asked all the time. At the end the program exits with 1
unless

- every answer was well-formed, and no status was 5xx except 503 with Retry-After, by a limit;
- the probe's answer was the same for the same weights from beginning to end;
- no sample and no block of the cache is left, and no open file;
- the resident memory of the server grew by less than GROWTH_BOUND in the second half;
- all that was to happen did happen: preemption, hits of the prefix cache, aborted samples, refusals by every limit.

Before the end schemathesis sends requests of every kind that the server's own OpenAPI document describes, and no
answer may be a 5xx or another one than documented.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch
from tokenizers import Tokenizer as BpeTokenizer

from benchmarks.conditions import store
from benchmarks.soak_requests import COMPLETIONS, LENGTH, VOCAB_SIZE, WORDS, Errand, errand, joined
from isthmus.data.tokenizer import BOS, EOS, Tokenizer
from isthmus.formats import get_format
from isthmus.formats.files.bundle import write_bundle
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.wire import digest, pack
from isthmus.model.model import Model
from isthmus.progress import Watch
from isthmus.recipe.architecture import DeepseekSection

CLIENTS, PATIENCE_S = 20, 120.0
PROBE_EVERY, UPDATES, MEMORY_EVERY = 20, 40, 25
GROWTH_BOUND = 2.0
"""MiB of resident memory per 1,000 requests, while the allocator's arenas still fill up."""
LOGPROB_BOUND = 1e-3
"""Nats by which a log-probability of the probe may move with the company that it is computed in."""
USERS = ("sk-alice", "sk-bob")
ADMIN = "sk-root"
PROBES = [
    {"prompt": list(range(40, 75)), "max_tokens": 24, "temperature": 0.0, "ignore_eos": True},
    {"prompt": list(range(80, 100)), "max_tokens": 24, "temperature": 1.0, "seed": 7, "ignore_eos": True},
]
SERVE = {
    "max_batch": 12,
    "cache_tokens": 768,
    "chunk_tokens": 64,
    "max_waiting": 16,
    "max_waiting_tokens": 800,
    "concurrent_requests": 13,
    "log_prompts": "true",
    "access_log_mib": 1,
}
# Qwen2.5's way of writing calls.
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }} {% endfor %}</tools>"
    '{{ "<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>" }}{% endif %}'
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Weights:
    """Two sets of weights. Even versions are the first, odd ones the second."""

    def __init__(self, architecture: DeepseekSection):
        models = [Model(architecture).initialise(seed) for seed in (0, 1)]
        self.first = models[0]
        self.sets = [get_format("fp32").export(model.state_dict(), architecture) for model in models]
        self.messages = [pack(tensors) for tensors in self.sets]


class Soak:
    """What the clients share: the server's address, what was seen, and what went wrong."""

    def __init__(self, port: int, pid: int, weights: Weights, requests: int, seed: int):
        self.port, self.pid, self.weights = port, pid, weights
        self.requests, self.seed = requests, seed
        self.numbers = itertools.count()
        self.done = 0
        self.kinds, self.statuses, self.departures = (collections.Counter[str]() for _ in range(3))
        self.faults: list[str] = []
        self.memory: list[tuple[int, float]] = []
        self.references: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        self.probes, self.logprob_drift, self.updates = 0, 0.0, 0
        self.version = 0
        self.metrics()
        self.files_at_start = self.count_files()
        self._lock = threading.Lock()

    def run(self, watch: Watch) -> None:
        self._learn_probes()
        with watch.count("soak", self.requests) as counter:
            clients = [threading.Thread(target=self._client) for _ in range(CLIENTS)]
            admin = threading.Thread(target=self._administrate)
            for thread in (*clients, admin):
                thread.start()
            while any(thread.is_alive() for thread in clients):
                counter.advance_to(min(self.done, self.requests), f"{self._rss():.0f} MiB, {len(self.faults)} faults")
                time.sleep(0.2)
            admin.join()
            counter.advance_to(self.requests, f"{self._rss():.0f} MiB, {len(self.faults)} faults")

    def _client(self) -> None:
        while (number := next(self.numbers)) < self.requests:
            try:
                if number % PROBE_EVERY == 0:
                    self._probe(number // PROBE_EVERY % len(PROBES))
                else:
                    self._send(errand(self.seed, number), USERS[number % len(USERS)])
            except Exception as error:  # noqa: BLE001 whatever goes wrong is what this program looks for
                self._fault(f"request {number}", error)
            with self._lock:
                self.done += 1
                if self.done % MEMORY_EVERY == 0:
                    self.memory.append((self.done, self._rss()))

    def _send(self, asked: Errand, key: str) -> None:
        with self._lock:
            self.kinds[asked.kind] += 1
        if asked.leaves is not None:
            self._leave(asked, key)
            return
        status, answer = self._until_taken(asked.path, asked.body, key)
        assert status == asked.status, f"{asked.kind}: {status} {answer}"
        asked.check(answer)

    def _until_taken(self, path: str, body: dict[str, Any], key: str) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request, sent again for as long as a limit refuses it."""
        end = time.monotonic() + PATIENCE_S
        while True:
            status, headers, text = self._ask("POST", path, json.dumps(body).encode(), key)
            with self._lock:
                self.statuses[str(status)] += 1
            if status not in (429, 503):
                streamed = status == 200 and body.get("stream")
                return status, joined(events(text), body) if streamed else json.loads(text)
            reason = json.loads(text)["error"]
            assert reason["code"] in ("overloaded", "rate_limit_exceeded") and int(headers["Retry-After"]) >= 1, text
            assert time.monotonic() < end, "the server refuses everything"
            time.sleep(0.3)

    def _leave(self, asked: Errand, key: str) -> None:
        """Send a request and go away before the answer, within it, or before the request is whole."""
        with self._lock:
            self.departures[asked.leaves or ""] += 1
        content = json.dumps(asked.body).encode()
        head = (
            f"POST {asked.path} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        ).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            connection.sendall(head + (content[: len(content) // 2] if asked.leaves == "unsent" else content))
            if asked.leaves == "midstream":
                seen = b""
                while seen.count(b"data: ") < 3 and b"[DONE]" not in seen and (part := connection.recv(4096)):
                    seen += part
                    if not seen.startswith(b"HTTP/1.1 200"):
                        break

    def _probe(self, which: int) -> None:
        status, answer = self._until_taken(COMPLETIONS, self._probe_body(which), USERS[which])
        assert status == 200, f"probe: {status} {answer}"
        choice = answer["choices"][0]
        first, last = choice["weight_versions"]
        if first != last:
            return
        tokens, logprobs = self.references[which, first % 2]
        assert choice["token_ids"] == tokens, f"probe {which}, weights {first}: {choice['token_ids']}, not {tokens}"
        drift = max(abs(a - b) for a, b in zip(choice["logprobs"]["token_logprobs"], logprobs, strict=True))
        assert drift < LOGPROB_BOUND, f"probe {which}: log-probabilities moved by {drift}"
        with self._lock:
            self.probes += 1
            self.logprob_drift = max(self.logprob_drift, drift)

    def _probe_body(self, which: int) -> dict[str, Any]:
        return {**PROBES[which], "logprobs": 0, "return_token_ids": True}

    def _learn_probes(self) -> None:
        """What the probes are answered with each set of weights while nothing else runs."""
        for turn in (0, 1):
            for which in range(len(PROBES)):
                status, answer = self._until_taken(COMPLETIONS, self._probe_body(which), USERS[0])
                assert status == 200, answer
                choice = answer["choices"][0]
                self.references[which, turn] = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            self._update_at_once()
        assert len({tuple(tokens) for tokens, _ in self.references.values()}) == len(self.references)

    def _administrate(self) -> None:
        """New weights now and then, in turn at once, in parts within a pause, damaged, and given up."""
        changes = [self._update_at_once, self._update_in_parts, self._send_damaged, self._begin_and_abort]
        for change in itertools.cycle(changes):
            due = self.done + self.requests // UPDATES
            while self.done < due:
                if self.done + CLIENTS >= self.requests:
                    return
                time.sleep(0.05)
            try:
                change()
            except Exception as error:  # noqa: BLE001 as above
                self._fault(change.__name__, error)

    def _admin(self, path: str, body: bytes = b"", expect: int = 200, **query: Any) -> dict[str, Any]:
        status, _, text = self._ask("POST", f"{path}?{urlencode(query)}", body, ADMIN, "application/octet-stream")
        assert status == expect, f"{path}: {status} {text}"
        return json.loads(text)

    def _next_message(self) -> bytes:
        return self.weights.messages[(self.version + 1) % 2]

    def _update_at_once(self) -> None:
        message = self._next_message()
        self._admin("/update_weights", message, version=self.version + 1, sha256=digest(message))
        self._updated()

    def _update_in_parts(self) -> None:
        tensors = self.weights.sets[(self.version + 1) % 2]
        names = sorted(tensors)
        self._admin("/pause", mode="keep", seconds=30)
        self._admin("/start_weight_update", version=self.version + 1)
        for part in (names[::2], names[1::2]):
            message = pack({name: tensors[name] for name in part})
            self._admin("/update_weights", message, sha256=digest(message))
        self._admin("/finish_weight_update", version=self.version + 1, sha256=WeightSet.of(0, tensors).sha256)
        self._admin("/resume")
        self._updated()

    def _send_damaged(self) -> None:
        message = self._next_message()
        self._admin("/update_weights", message[:-1], 400, version=self.version + 1, sha256=digest(message))

    def _begin_and_abort(self) -> None:
        self._admin("/start_weight_update", version=self.version + 1)
        self._admin("/abort_weight_update")

    def _updated(self) -> None:
        self.version += 1
        self.updates += 1

    def _ask(
        self, method: str, path: str, body: bytes | None, key: str, kind: str = "application/json"
    ) -> tuple[int, http.client.HTTPMessage, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": kind, "Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()

    def metrics(self) -> dict[str, float]:
        """Every metric of the server."""
        return read_metrics(self.port, ADMIN)

    def wait_until_idle(self) -> dict[str, float]:
        """The metrics when nothing runs, waits or holds a block, or after a minute."""
        end = time.monotonic() + 60
        while True:
            found = self.metrics()
            if not any(found[name] for name in LEFT) or time.monotonic() > end:
                return found
            time.sleep(0.1)

    def count_files(self) -> int:
        """Open files and sockets of the server."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def files_left(self) -> int:
        """Those that are open when closed connections are gone, or after a minute."""
        end = time.monotonic() + 60
        while (found := self.count_files()) > self.files_at_start and time.monotonic() < end:
            time.sleep(0.2)
        return found

    def growth(self) -> float:
        """MiB of resident memory per 1,000 requests, by least squares over the second half."""
        half = [(done, mib) for done, mib in self.memory if done >= self.requests / 2]
        return statistics.linear_regression([done / 1000 for done, _ in half], [mib for _, mib in half]).slope

    def _rss(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    def _fault(self, what: str, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{what}: {type(error).__name__} in line {place.lineno} of {Path(place.filename).name}: {error}"
        with self._lock:
            self.faults.append(text[:600])


LEFT = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
HAPPENED = (
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total abort",
    "vllm:request_success_total stop",
    "vllm:request_success_total length",
    "vllm:admission_rejections_total max_num_queued_reqs",
    "vllm:admission_rejections_total max_num_queued_tokens",
    "vllm:admission_rejections_total concurrent_requests",
    "isthmus:weight_updates_total",
    "isthmus:refused_weight_updates_total",
)


def read_metrics(port: int, key: str = "") -> dict[str, float]:
    """Every metric of a server, summed over all labels but `reason` and `finished_reason`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", None, {"Authorization": f"Bearer {key}"} if key else {})
        lines = connection.getresponse().read().decode().splitlines()
    found: collections.Counter[str] = collections.Counter()
    for line in lines:
        if line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        name, _, labels = name.partition("{")
        for label in labels.rstrip("}").split(","):
            if label.startswith(("reason=", "finished_reason=")):
                name += f" {label.split('=')[1].strip(chr(34))}"
        found[name] += float(value)
    return dict(found)


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a whole stream. Raises AssertionError if it is not one, or if it tells of an error."""
    parts = text.split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]", f"the stream ends with {text[-200:]!r}"
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
    assert all("error" not in chunk for chunk in chunks), chunks[-1]
    return chunks


@contextlib.contextmanager
def served(
    folder: Path, scratch: Path, settings: dict[str, Any] | None = None, keys: dict[str, str] | None = None
) -> Iterator[tuple[int, int]]:
    """`isthmus serve` in a process of its own: its port and its number. `keys` are variables of its environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "isthmus", "serve", str(folder), "--port", str(port), "--allow-unsealed"]
    command += ["--access-log", str(scratch / "access.jsonl")]
    for name, value in (SERVE if settings is None else settings).items():
        command += ["--set", f"serve.{name}={value}"]
    if keys is None:
        keys = {"ISTHMUS_API_KEYS": ",".join(f"{key[3:]} {key}" for key in USERS), "ISTHMUS_ADMIN_KEY": ADMIN}
    with (scratch / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **keys})
    try:
        wait_for(port, process, scratch / "server.log")
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as asked:
            asked.request("GET", "/ping")
            if asked.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"the server does not answer:\n{log.read_text()}")


def make_bundle(folder: Path, template: str = TEMPLATE) -> Weights:
    """Two layers, four experts, 300 tokens, sequences of 256."""
    architecture = DeepseekSection(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
    )
    learned = Tokenizer.train([" ".join(WORDS)] * 3, VOCAB_SIZE)
    tokenizer = Tokenizer(BpeTokenizer.from_str(learned.serialise()), template, BOS, EOS)
    weights = Weights(architecture)
    write_bundle(folder, "fp32", weights.first.state_dict(), architecture, tokenizer)
    return weights


def conforms(port: int, scratch: Path, examples: int) -> bool:
    """Whether schemathesis finds nothing. /pause is left out: whoever asks then would wait."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    command += [f"http://127.0.0.1:{port}/openapi.json", "-H", f"Authorization: Bearer {ADMIN}", "--checks", checks]
    command += ["--max-examples", str(examples), "--phases", "fuzzing", "--generation-deterministic", "--no-color"]
    command += ["--exclude-path", "/pause"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-2000:])
    return done.returncode == 0


def verdicts(soak: Soak, metrics: dict[str, float], files: int, documented: bool) -> dict[str, bool]:
    """What has to hold, and whether it does."""
    served_5xx = [status for status in soak.statuses if status >= "5" and status != "503"]
    return {
        "every answer is well-formed, every probe the same": not soak.faults,
        "no 5xx but 503 by a limit": not served_5xx,
        "nothing runs, waits or holds a block": not any(metrics[name] for name in LEFT),
        "no open file is left": files <= soak.files_at_start,
        f"memory grows by less than {GROWTH_BOUND} MiB per 1,000 requests": soak.growth() < GROWTH_BOUND,
        "schemathesis finds no 5xx and nothing that is not documented": documented,
        "all that was to happen did": all(metrics.get(name, 0) > 0 for name in HAPPENED),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        weights = make_bundle(scratch / "bundle")
        with served(scratch / "bundle", scratch) as (port, pid):
            soak = Soak(port, pid, weights, options.requests, options.seed)
            began = time.monotonic()
            soak.run(watch)
            seconds = time.monotonic() - began
            happened = soak.wait_until_idle()
            documented = conforms(port, scratch, max(10, options.requests // 50))
            left, files = soak.wait_until_idle(), soak.files_left()
            metrics = happened | {name: left[name] for name in LEFT}
        said = (scratch / "server.log").read_text()
    found = verdicts(soak, metrics, files, documented)
    for text, holds in found.items():
        watch.say(f"  {'[green]yes[/]' if holds else '[red]NO[/] '} {text}")
    for fault in soak.faults[:20]:
        watch.console.print(f"  {fault}", markup=False, highlight=False)
    if not all(found.values()):
        watch.console.print({name: metrics.get(name, 0) for name in (*LEFT, *HAPPENED)}, said[-3000:], markup=False)
        raise SystemExit(1)
    store("soak", result_of(soak, metrics, seconds, found))


def result_of(soak: Soak, metrics: dict[str, float], seconds: float, found: dict[str, bool]) -> dict[str, Any]:
    """What is stored: numbers, and every condition that held."""
    return {
        "requests": soak.requests,
        "seed": soak.seed,
        "seconds": round(seconds, 1),
        "clients": CLIENTS,
        "serve": SERVE,
        "held": list(found),
        "statuses": dict(sorted(soak.statuses.items())),
        "kinds": dict(sorted(soak.kinds.items())),
        "left_early": dict(sorted(soak.departures.items())),
        "weight_updates": soak.updates,
        "probes_alike": soak.probes,
        "probe_logprob_drift": soak.logprob_drift,
        "memory_mib": {str(done): round(mib, 1) for done, mib in soak.memory[:: max(1, len(soak.memory) // 20)]},
        "memory_growth_mib_per_1000_requests": round(soak.growth(), 3),
        "metrics": {name: metrics.get(name, 0) for name in (*LEFT, *HAPPENED)},
    }


if __name__ == "__main__":
    main()
