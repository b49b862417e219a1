"""One well-behaved client beside clients that mean harm: whether its short answers still come, and come soon.

    OMP_NUM_THREADS=1 python -m benchmarks.soak_hostile [--seconds 180]

A small bundle with random weights is served by `isthmus serve` as it is set by default. Attackers in a process of their
own send what KINDS names, one request after the other. A client asks for five tokens again and again, first alone, then
beside them: the time alone is the rival. At the end the program exits with 1 unless

- no status was 5xx except 503 with Retry-After, and the client's every answer was whole;
- the 99th percentile of its times was under P99_BOUND;
- the resident memory of the server at rest, between two rounds of attacks, grew by less than GROWTH_BOUND;
- no sample and no open file is left, and every kind of attack was sent.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import random
import resource
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import store
from benchmarks.soak import LEFT, TEMPLATE, events, make_bundle, read_metrics, served
from benchmarks.soak_requests import CHAT, COMPLETIONS
from isthmus.progress import Watch

ATTACKERS, ALONE_S, PATIENCE_S = 8, 10.0, 60.0
P99_BOUND = 1.0
"""Seconds for five tokens."""
GROWTH_BOUND = 2.0
"""MiB of resident memory per 1,000 requests of all clients."""
ROUNDS, REST_S = 6, 8.0
"""Of attacks, and the pause after each, in which large bodies are gone and freed memory is given back. What the first
one leaves is what the server needs at work."""
HELD_S = 2.0
"""How long a client that does not read, or does not go on, stays."""
# What a template of a bundle may do when it is asked to.
HOSTILE_TEMPLATE = (
    TEMPLATE + "{% if loops %}{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
    "{% endif %}{% if power %}{{ 10 ** 10000000 }}{% endif %}{% if long %}{{ 'a' * 99999999999 }}{% endif %}"
)
Attack = Callable[["Attacker"], int | None]


class Attacker:
    """One hostile client at a time; `status` of an answer is None where it did not wait for one."""

    def __init__(self, port: int, draw: random.Random):
        self.port, self.draw = port, draw

    def post(self, path: str, body: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            # The server may have answered, and read no more.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status != 503 or int(answer.headers["Retry-After"]) >= 1
            return answer.status

    def ask(self, path: str, **fields: Any) -> int:
        return self.post(path, json.dumps(fields).encode())

    def send_and_stay(self, path: str, body: bytes, stay_s: float, announced: int | None = None) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            connection.sendall(f"{head}Content-Length: {announced or len(body)}\r\n\r\n".encode() + body)
            time.sleep(stay_s)


def huge_text(one: Attacker) -> int:
    return one.post(COMPLETIONS, b'{"prompt": "' + b"word " * 3_000_000 + b'"}')


def huge_list(one: Attacker) -> int:
    return one.post(COMPLETIONS, b'{"prompt": [' + b"1," * 1_900_000 + b"1]}")


def too_long(one: Attacker) -> int:
    return one.post(COMPLETIONS, b" " * (17 << 20))


def half_a_body(one: Attacker) -> None:
    one.send_and_stay(COMPLETIONS, b" " * (1 << 20), HELD_S, announced=15 << 20)


def many_keys(one: Attacker) -> int:
    count = one.draw.choice([19_000, 900_000])
    return one.post(COMPLETIONS, b"{" + b",".join(b'"k%d":1' % number for number in range(count)) + b"}")


def deep(one: Attacker) -> int:
    return one.post(CHAT, one.draw.choice([b"[", b'{"a":']) * 100_000)


def long_regex(one: Attacker) -> int:
    inner = "".join(one.draw.choice("abc") for _ in range(24_750))
    pattern = one.draw.choice(["(" + "|".join(inner) + ")*", f"({inner}){{9999}}", f"{inner}.*" * 4])[:99_000]
    return one.ask(COMPLETIONS, prompt="a", structured_outputs={"regex": pattern})


def costly_grammar(one: Attacker) -> int:
    pattern = one.draw.choice(["(a|b|ab)*" * 400, "(.*a){30}", "[a-z]{1,900}" * 4, "((a{1,30}){1,30}){1,30}"])
    return one.ask(COMPLETIONS, prompt="a", max_tokens=20, structured_outputs={"regex": pattern})


def many_samples(one: Attacker) -> int:
    return one.ask(COMPLETIONS, prompt=[one.draw.randrange(300)] * 20, n=64, max_tokens=60, ignore_eos=True)


def slow_reader(one: Attacker) -> None:
    fields = {"prompt": [7] * 9, "n": 64, "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 5}
    one.send_and_stay(COMPLETIONS, json.dumps(fields).encode(), HELD_S)


def abort(one: Attacker) -> None:
    fields = {"prompt": [9] * 30, "n": 16, "max_tokens": 200, "ignore_eos": True, "stream": one.draw.random() < 0.5}
    one.send_and_stay(COMPLETIONS, json.dumps(fields).encode(), one.draw.random() / 10)


def hostile_template(one: Attacker) -> int:
    turns = [{"role": "user", "content": "a"}]
    what = one.draw.choice(["loops", "power", "long"])
    return one.ask(CHAT, messages=turns, max_tokens=2, chat_template_kwargs={what: True})


def many_turns(one: Attacker) -> int:
    return one.ask(CHAT, messages=[{"role": "user", "content": "a"}] * 6_000, max_tokens=2)


KINDS: tuple[Attack, ...] = (
    huge_text,
    huge_list,
    too_long,
    half_a_body,
    many_keys,
    deep,
    long_regex,
    costly_grammar,
    many_samples,
    slow_reader,
    abort,
    hostile_template,
    many_turns,
)


def attack(port: int, seed: int, over: Any, told: Any) -> None:
    """Send everything of KINDS in turn from several threads until `over` is set, then tell what came back."""
    sent, faults, numbers, lock = collections.Counter[str](), [], itertools.count(), threading.Lock()

    def client() -> None:
        while not over.is_set():
            number = next(numbers)
            kind = KINDS[number % len(KINDS)]
            try:
                status = kind(Attacker(port, random.Random(f"{seed} {number}")))
            except Exception as error:  # noqa: BLE001 whatever goes wrong is what this program looks for
                with lock:
                    faults.append(f"{kind.__name__}: {error!r}")
                continue
            with lock:
                sent[f"{kind.__name__} {status or 'left'}"] += 1

    threads = [threading.Thread(target=client) for _ in range(ATTACKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.put((dict(sent), faults))


def short_answer(port: int) -> float:
    """Seconds until five tokens are here, by one of the three ways that a client asks. Raises AssertionError."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    streamed = random.random() < 0.5
    fields = {"prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True, "stream": streamed, "return_token_ids": True}
    with contextlib.closing(connection):
        connection.request("POST", COMPLETIONS, json.dumps(fields), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    taken = time.monotonic() - began
    assert answer.status == 200, f"{answer.status} {text[:300]}"
    parts = events(text) if streamed else [json.loads(text)]
    tokens = [token for part in parts for choice in part["choices"] for token in choice.get("token_ids", [])]
    assert len(tokens) == 5, text[:300]
    return taken


def ask_for(port: int, seconds: float) -> tuple[list[float], list[str]]:
    """The times of short answers for so long, and what went wrong."""
    times, faults, end = [], [], time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            times.append(short_answer(port))
        except (AssertionError, OSError, ValueError, KeyError) as error:
            faults.append(f"the client: {error!r}"[:400])
        time.sleep(0.02)
    return times, faults


def percentiles(times: list[float]) -> dict[str, float]:
    """Seconds."""
    ordered = sorted(times)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) for name, share in at.items()}


def rss(pid: int) -> float:
    """MiB of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def growth_at_rest(memory: list[float], requests: list[int]) -> float:
    """MiB per 1,000 requests: of the memory after each round, by the requests of all clients until then."""
    return 1000 * statistics.linear_regression(list(itertools.accumulate(requests)), memory).slope


def files_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def wait_until(holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    end = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def one_round(port: int, seconds: float, seed: int) -> tuple[list[float], collections.Counter[str], list[str]]:
    """The times of short answers beside attacks, what was attacked, and what went wrong."""
    starting = multiprocessing.get_context("fork")
    over, told = starting.Event(), starting.Queue()
    attackers = starting.Process(target=attack, args=(port, seed, over, told))
    attackers.start()
    times, faults = ask_for(port, seconds)
    over.set()
    sent, theirs = told.get(timeout=3 * PATIENCE_S)
    attackers.join()
    return times, collections.Counter(sent), [*faults, *theirs]


def measure(port: int, pid: int, seconds: float, seed: int) -> tuple[dict[str, Any], dict[str, bool], list[str]]:
    """What is stored, what has to hold, and what went wrong."""
    alone, faults = ask_for(port, ALONE_S)
    files, memory, requests, beside = files_of(pid), list[float](), list[int](), list[float]()
    sent = collections.Counter[str]()
    for number in range(ROUNDS):
        times, attacks, more = one_round(port, seconds / ROUNDS, seed * ROUNDS + number)
        beside, sent, faults = beside + times, sent + attacks, faults + more
        time.sleep(REST_S)
        memory.append(rss(pid))
        requests.append(len(times) + attacks.total())
    growth = growth_at_rest(memory[1:], requests[1:])
    statuses = collections.Counter[str]()
    for name, count in sent.items():
        statuses[name.rpartition(" ")[2]] += count
    found = {
        "no 5xx but 503 with Retry-After, and every short answer whole": not faults
        and not [status for status in statuses if status.startswith("5") and status != "503"],
        f"p99 of a short answer under {P99_BOUND:g} s": percentiles(beside)["p99"] < P99_BOUND,
        f"memory grows by less than {GROWTH_BOUND:g} MiB per 1,000 requests": growth < GROWTH_BOUND,
        "nothing runs, waits or holds a block": wait_until(lambda: not any(read_metrics(port)[one] for one in LEFT)),
        "no open file is left": wait_until(lambda: files_of(pid) <= files),
        "every kind was sent": all(any(name.startswith(f"{kind.__name__} ") for name in sent) for kind in KINDS),
    }
    result = {
        "seconds": seconds,
        "attackers": ATTACKERS,
        "seed": seed,
        "hostile_requests": sum(sent.values()),
        "short_answers": len(beside),
        "alone_s": percentiles(alone),
        "beside_s": percentiles(beside),
        "p99_times_alone": round(percentiles(beside)["p99"] / percentiles(alone)["p99"], 1),
        "statuses": dict(sorted(statuses.items())),
        "sent": dict(sorted(sent.items())),
        "memory_at_rest_mib": [round(mib, 1) for mib in memory],
        "memory_growth_mib_per_1000_requests": round(growth, 3),
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    return result, found, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    watch, load = Watch(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_bundle(scratch / "bundle", HOSTILE_TEMPLATE)
        with served(scratch / "bundle", scratch, settings={}, keys={}) as (port, pid):
            result, found, faults = measure(port, pid, options.seconds, options.seed)
        said = (scratch / "server.log").read_text()
    result["load_average_before"] = round(load, 2)
    watch.console.print_json(json.dumps(result))
    for text, holds in found.items():
        watch.say(f"  {'[green]yes[/]' if holds else '[red]NO[/] '} {text}")
    for fault in faults[:20]:
        watch.console.print(f"  {fault}", markup=False, highlight=False)
    kept = {"held": [text for text, holds in found.items() if holds]}
    kept["not_held"] = [text for text, holds in found.items() if not holds]
    store("soak_hostile", {**result, **kept})
    if kept["not_held"]:
        watch.console.print(said[-3000:], markup=False)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
