"""The server as something to leave running: keys, limits, log, pause, drain, and updates over the wire."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from isthmus import __version__
from isthmus.engines import EngineError, Sampling
from isthmus.engines.local import LocalEngine
from isthmus.engines.local.api.access_log import AccessLog
from isthmus.engines.local.api.keys import Keyring
from isthmus.engines.local.api.limits import KeyLimits, Rate
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import load_service
from isthmus.engines.local.api.visit import Visit
from isthmus.engines.local.core.scheduler import Finished, Request
from isthmus.engines.remote import HttpEngine
from isthmus.formats import get_format
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.wire import digest, pack
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle
from tests.support.live_server import PATIENCE_S, InBackground, ask, greedy, live, metric, wait_until

USER, OTHER, ADMIN = "sk-alice", "sk-bob", "sk-root"
SECRET = "the reef of the three wrecks"
BODY = {"prompt": "Use 3", "max_tokens": 4}
ADMIN_ROUTES = [
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/start_weight_update?version=9"),
    ("POST", "/update_weights?version=9&sha256=0"),
    ("POST", "/finish_weight_update?version=9"),
    ("POST", "/abort_weight_update"),
    ("GET", "/weight_info"),
    ("GET", "/weight_checksums"),
    ("GET", "/usage"),
    ("GET", "/canary"),
    ("POST", "/canary/run"),
]


def keyring():
    return Keyring.load(None, {"ISTHMUS_API_KEYS": f"alice {USER},bob {OTHER}", "ISTHMUS_ADMIN_KEY": ADMIN})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations") / "small"
    write_small_bundle(folder)
    return folder


@pytest.fixture
def served(bundle, tmp_path):
    """Serves a fresh engine with these options; returns (port, service, server)."""
    running = []

    def start(*, slots=8, **options):
        service = load_service(bundle, slots=slots)
        server = Server(service, **options)
        opened = live(server)
        running.append(opened)
        return opened.__enter__(), service, server

    yield start
    for opened in running:
        opened.__exit__(None, None, None)


def log_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors_of(seed):
    model = thinking_model(small_tokenizer(), seed)
    return get_format("fp32").export(model.state_dict(), model.architecture)


def test_routes_have_levels(served):
    port, _, server = served(keys=keyring(), page=True)
    for method, path in [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"), *ADMIN_ROUTES]:
        status, headers, content = ask(port, method, path, BODY if method == "POST" else None)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), path
        assert content["error"]["code"] == "invalid_api_key"
        assert ask(port, method, path, key="sk-nobody")[0] == 401
    for method, path in ADMIN_ROUTES:
        status, _, content = ask(port, method, path, key=USER)
        assert (status, content["error"]["code"]) == (403, "admin_key_required"), path
    for key in (USER, OTHER, ADMIN):
        assert ask(port, "GET", "/v1/models", key=key)[0] == 200
    for path in ("/", "/chat.js", "/chat.css", "/health", "/ready", "/ping", "/version"):
        assert ask(port, "GET", path)[0] == 200
    assert ask(port, "GET", "/version")[2] == {"version": __version__}
    named = {route.path for route in server.app().routes}
    assert {path.partition("?")[0] for _, path in ADMIN_ROUTES} < named
    assert not {path.partition("?")[0] for _, path in ADMIN_ROUTES} & {
        r.path for r in Server(server.service).app().routes
    }


def test_the_dossier_is_given_to_who_has_a_key_once_it_is_written(served, tmp_path):
    dossier = tmp_path / "report.html"
    port, _, _ = served(keys=keyring(), page=True, report=dossier)
    assert ask(port, "GET", "/report", key=USER)[0] == 404 and ask(port, "GET", "/health")[2]["report"] is False
    dossier.write_text("<!doctype html><title>dossier</title>", encoding="utf-8")
    assert ask(port, "GET", "/health")[2]["report"] is True
    assert ask(port, "GET", "/report")[0] == 401
    status, headers, content = ask(port, "GET", "/report", key=USER)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8") and "dossier" in str(content)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_an_open_server_takes_any_key(served):
    port, _, _ = served()
    assert ask(port, "GET", "/v1/models", key="whatever")[0] == 200


def test_requests_keep_their_id_and_the_log_their_text_to_itself(served, tmp_path):
    path = tmp_path / "deep" / "access.jsonl"
    port, _, _ = served(keys=keyring(), log=AccessLog(path))
    body = {"prompt": SECRET, "max_tokens": 6, "n": 2, "user": SECRET}
    _, headers, answer = ask(port, "POST", "/v1/completions", body, USER, {"X-Request-Id": "mine-1.2:3"})
    assert headers["X-Request-Id"] == "mine-1.2:3"
    for bad in ("x" * 200, "a b", 'a"b'):
        _, headers, _ = ask(port, "POST", "/v1/completions", {**body, "stream": True}, OTHER, {"X-Request-Id": bad})
        assert re.fullmatch("[0-9a-f]{32}", headers["X-Request-Id"])
    assert ask(port, "POST", "/v1/completions", {"prompt": SECRET, "model": SECRET}, USER)[0] == 404
    assert ask(port, "POST", "/v1/completions", {"prompt": SECRET, SECRET: 1}, USER)[0] == 400
    ask(port, "GET", "/health")
    wait_until(lambda: len(log_lines(path)) == 6)
    lines = log_lines(path)
    first = lines[0]
    assert (first["request_id"], first["key"], first["route"], first["status"]) == (
        "mine-1.2:3",
        "alice",
        "/v1/completions",
        200,
    )
    assert first["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert first["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert sorted(first["finish_reasons"]) == sorted(choice["finish_reason"] for choice in answer["choices"])
    assert first["weight_versions"] == [0, 0] and 0 < first["first_token_s"] <= first["duration_s"]
    assert not first["stream"] and lines[1]["stream"] and lines[1]["key"] == "bob"
    assert [line["error"] for line in lines] == [None] * 4 + ["model_not_found", "unknown_parameter"]
    assert SECRET not in path.read_text() and "sk-" not in path.read_text()
    usage = ask(port, "GET", "/usage", key=ADMIN)[2]["keys"]
    assert (usage["alice"]["requests"], usage["bob"]["requests"]) == (3, 3)
    assert usage["alice"]["completion_tokens"] == first["completion_tokens"]


def test_prompts_are_logged_only_where_that_was_asked_for(served, tmp_path):
    path = tmp_path / "access.jsonl"
    port, _, _ = served(log=AccessLog(path, log_prompts=True))
    answer = ask(port, "POST", "/v1/completions", {"prompt": SECRET, "max_tokens": 6})[2]
    wait_until(lambda: path.read_text())
    line = log_lines(path)[0]
    assert line["prompts"] == [SECRET] and line["completions"] == [answer["choices"][0]["text"]]


def test_a_log_file_is_rotated(tmp_path):
    log = AccessLog(tmp_path / "log", file_bytes=1000)
    for number in range(200):
        log.event("test", number=number)
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["log", "log.1", "log.2", "log.3", "log.4"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert log_lines(tmp_path / "log")[-1]["number"] == 199


def test_a_client_that_leaves_is_logged_with_what_it_got(served, tmp_path):
    path = tmp_path / "access.jsonl"
    port, service, server = served(log=AccessLog(path), admin_key=ADMIN)
    ask(port, "POST", "/pause", key=ADMIN)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("POST", "/v1/completions", json.dumps(BODY), {"Content-Type": "application/json"})
    wait_until(lambda: service.core.waiting == 1)
    connection.close()
    wait_until(lambda: service.core.waiting == 0 and "/v1/completions" in path.read_text())
    line = next(line for line in log_lines(path) if line.get("route") == "/v1/completions")
    assert (line["status"], line["finish_reasons"], line["completion_tokens"]) == (499, ["abort"], 0)
    assert server.gate.generating == 0
    ask(port, "POST", "/resume", key=ADMIN)
    greedy(port)


def test_a_visit_ends_with_its_last_sample_even_if_the_client_left_before():
    visit, ended = Visit("POST", "/v1/completions"), []
    visit.admitted([[1, 2]], n=2)
    visit.submitted(Request([[1, 2]], visit.tell, 4, n=2))
    visit.tell(Finished(0, [5], [-0.1], [], "stop", 3, 3, 0.5, 0.5))
    visit.end(ended.append)
    assert ended == []
    visit.tell(Finished(1, [5, 6], [-0.1, -0.2], [], "abort", 3, 4, 0.25, 0.5))
    assert ended == [visit]
    assert (visit.generated_tokens, visit.versions(), visit.first_token_s()) == (3, (3, 4), 0.25)
    never = Visit("POST", "/v1/completions")
    never.admitted([[1]], n=1)
    never.end(ended.append)
    assert ended == [visit, never], "what was never submitted is not waited for"


def test_each_key_has_its_own_budget(served):
    port, _, _ = served(keys=keyring(), limits=KeyLimits(requests_per_minute=3, tokens_per_minute=10_000))
    for left in (2, 1, 0):
        status, headers, answer = ask(port, "POST", "/v1/completions", BODY, USER)
        assert status == 200
        assert headers["x-ratelimit-limit-requests"] == "3"
        assert headers["x-ratelimit-remaining-requests"] == str(left)
        assert int(headers["x-ratelimit-remaining-tokens"]) <= 10_000 - answer["usage"]["prompt_tokens"]
        assert re.fullmatch(r"\d+s|\d+m\d+s|\d+ms", headers["x-ratelimit-reset-requests"])
    status, headers, content = ask(port, "POST", "/v1/completions", BODY, USER)
    assert (status, content["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(headers["Retry-After"]) <= 20
    assert ask(port, "GET", "/v1/models", key=USER)[0] == 200, "only what generates is counted"
    assert ask(port, "POST", "/v1/completions", BODY, OTHER)[0] == 200
    _, _, page = ask(port, "GET", "/metrics", key=ADMIN)
    name = "vllm:admission_rejections_total"
    labels = '{engine="0",model_name="small",reason="requests_per_minute"}'
    assert f"{name}{labels} 1.0" in page


def test_generated_tokens_are_charged_too(served):
    port, _, _ = served(limits=KeyLimits(tokens_per_minute=60))
    body = {"prompt": [5, 6], "max_tokens": 80, "temperature": 0.0, "logit_bias": None}
    spent = []
    for _ in range(40):
        status, headers, answer = ask(port, "POST", "/v1/completions", body)
        if status == 429:
            break
        spent.append(answer["usage"]["total_tokens"])
    assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded"
    assert sum(spent[:-1]) <= 75, "only the last one may have overdrawn it; one token comes back per second"
    assert sum(spent) > 58 and int(headers["x-ratelimit-remaining-tokens"]) <= 2


def test_one_key_has_only_so_many_requests_at_a_time(served):
    port, service, _ = served(keys=keyring(), limits=KeyLimits(concurrent=1))
    ask(port, "POST", "/pause", key=ADMIN)
    first = InBackground(ask, port, "POST", "/v1/completions", BODY, USER)
    wait_until(lambda: service.core.waiting == 1)
    assert ask(port, "POST", "/v1/completions", BODY, USER)[0] == 429
    second = InBackground(ask, port, "POST", "/v1/completions", BODY, OTHER)
    wait_until(lambda: service.core.waiting == 2)
    ask(port, "POST", "/resume", key=ADMIN)
    assert first.result()[0] == second.result()[0] == 200
    assert ask(port, "POST", "/v1/completions", BODY, USER)[0] == 200


def test_the_line_has_an_end_in_samples_and_in_tokens(served):
    port, service, _ = served(keys=keyring())
    service.max_waiting, service.max_waiting_tokens = 3, 50
    greedy(port, key=USER)
    ask(port, "POST", "/pause", key=ADMIN)
    waiting = [InBackground(ask, port, "POST", "/v1/completions", {**BODY, "prompt": [5] * 40, "n": 1}, USER)]
    wait_until(lambda: service.core.waiting == 1)
    status, headers, content = ask(port, "POST", "/v1/completions", {**BODY, "prompt": [5] * 11}, USER)
    assert (status, content["error"]["code"]) == (503, "overloaded") and 1 <= int(headers["Retry-After"]) <= 60
    waiting.append(InBackground(ask, port, "POST", "/v1/completions", {**BODY, "prompt": [5] * 5, "n": 2}, USER))
    wait_until(lambda: service.core.waiting == 3)
    status, headers, content = ask(port, "POST", "/v1/completions", {**BODY, "prompt": [5]}, USER)
    assert (status, content["error"]["code"]) == (503, "overloaded") and "3 samples wait" in content["error"]["message"]
    ask(port, "POST", "/resume", key=ADMIN)
    assert [one.result()[0] for one in waiting] == [200, 200]
    greedy(port, key=USER)
    page = ask(port, "GET", "/metrics", key=USER)[2]
    for reason in ("max_num_queued_reqs", "max_num_queued_tokens"):
        assert f'vllm:admission_rejections_total{{engine="0",model_name="small",reason="{reason}"}} 1.0' in page


def test_a_burst_does_not_slip_past_the_end_of_the_line(served):
    port, service, server = served(admin_key=ADMIN)
    service.max_waiting = 4
    ask(port, "POST", "/pause", key=ADMIN)
    burst = [InBackground(ask, port, "POST", "/v1/completions", BODY) for _ in range(12)]
    wait_until(lambda: sum(not one.is_alive() for one in burst) == 8)
    assert server.gate.unfinished == 4
    ask(port, "POST", "/resume", key=ADMIN)
    assert sorted(one.result()[0] for one in burst) == [200] * 4 + [503] * 8


def test_when_to_ask_again_comes_from_the_measured_rate(served):
    port, service, server = served(admin_key=ADMIN)
    service.max_waiting, service.max_waiting_tokens = 2, 30
    ask(port, "POST", "/pause", key=ADMIN)
    waiting = InBackground(ask, port, "POST", "/v1/completions", {**BODY, "prompt": [5] * 20})
    wait_until(lambda: service.core.waiting == 1)
    now = [0.0]
    samples, tokens = Rate(lambda: now[0]), Rate(lambda: now[0])
    now[0] = 10.0
    samples.add(0.5)
    tokens.add(40)
    server.gate.sample_rate, server.gate.prompt_rate = samples, tokens
    headers = ask(port, "POST", "/v1/completions", {**BODY, "prompt": [5] * 22})[1]
    assert headers["Retry-After"] == "3", "12 tokens too many; 40 tokens in 10 s, weighted by the decay"
    second = InBackground(ask, port, "POST", "/v1/completions", {**BODY, "prompt": [5]})
    wait_until(lambda: service.core.waiting == 2)
    assert ask(port, "POST", "/v1/completions", BODY)[1]["Retry-After"] == "18", "one sample; half a one in 10 s"
    ask(port, "POST", "/resume", key=ADMIN)
    assert waiting.result()[0] == second.result()[0] == 200


def test_a_prompt_longer_than_the_whole_line_is_taken_when_nothing_waits(served):
    port, service, _ = served()
    service.max_waiting_tokens = 10
    assert ask(port, "POST", "/v1/completions", {**BODY, "prompt": [5] * 60})[0] == 200


def test_metrics_have_the_names_and_types_of_vllm(served):
    port, _, _ = served()
    body = {"prompt": ["Use 3", "Use 4 and 5"], "max_tokens": 9, "n": 2, "seed": 1, "return_token_ids": True}
    answer = ask(port, "POST", "/v1/completions", body)[2]
    ask(port, "POST", "/v1/completions", {**body, "prompt": "Use", "n": 1, "stream": True})
    page = ask(port, "GET", "/metrics")[2]
    types = dict(re.findall(r"# TYPE (\S+) (\S+)", page))
    expected = {
        "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"],
        "counter": [
            "prompt_tokens_total",
            "generation_tokens_total",
            "request_success_total",
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
            "num_preemptions_total",
            "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
        ],
        "histogram": [
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "request_time_per_output_token_seconds",
            "e2e_request_latency_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "iteration_tokens_total",
        ],
    }
    for kind, names in expected.items():
        assert {name: types.get(f"vllm:{name}") for name in names} == dict.fromkeys(names, kind)
    assert 'vllm:num_requests_running{engine="0",model_name="small"} 0.0' in page
    assert metric(port, "vllm:request_prompt_tokens_count") == metric(port, "vllm:request_success_total") == 5
    usage = answer["usage"]
    streamed = metric(port, "vllm:generation_tokens_total") - usage["completion_tokens"]
    assert 1 <= streamed <= 9
    assert metric(port, "vllm:request_generation_tokens_sum") == usage["completion_tokens"] + streamed
    assert metric(port, "vllm:inter_token_latency_seconds_count") == streamed - 1 + sum(
        1 for choice in answer["choices"] if len(choice["token_ids"]) > 1
    )
    assert metric(port, "isthmus:engine_steps_total") == metric(port, "vllm:iteration_tokens_total_count") > 0
    assert 'isthmus:seal_info{engine="0",format="fp32",model_name="small",pool="",rehearsed="",seal=""} 1.0' in page
    assert re.search(r"^process_resident_memory_bytes [1-9]", page, re.MULTILINE)


def test_a_pause_keeps_what_runs_and_what_comes(served):
    port, service, _ = served(admin_key=ADMIN)
    alone = greedy(port, tokens=60)
    started = InBackground(greedy, port, tokens=60)
    status, _, content = ask(port, "POST", "/pause?mode=keep", key=ADMIN)
    assert status == 200 and content["paused"]
    later = InBackground(greedy, port, tokens=60)
    wait_until(lambda: service.core.waiting >= 1)
    assert ask(port, "GET", "/ready")[0] == 503 and ask(port, "GET", "/ready")[2] == {"status": "paused"}
    assert ask(port, "GET", "/health")[0] == 200
    assert ask(port, "GET", "/weight_info", key=ADMIN)[2]["paused"] is True
    assert later.is_alive()
    ask(port, "POST", "/resume", key=ADMIN)
    for one in (started, later):
        assert one.result()["token_ids"] == alone["token_ids"]
    assert ask(port, "GET", "/ready")[2] == {"status": "ready"}
    assert ask(port, "POST", "/pause?mode=abort", key=ADMIN)[0] == 400


def test_a_pause_can_wait_for_what_runs_and_holds_what_comes(served):
    port, service, server = served(admin_key=ADMIN)
    service.core.pause()
    running = InBackground(greedy, port, tokens=40)
    wait_until(lambda: service.core.waiting == 1)
    pausing = InBackground(ask, port, "POST", "/pause?mode=wait", key=ADMIN)
    wait_until(lambda: server.gate.state == "paused" and server.gate.closed)
    held = InBackground(greedy, port, tokens=40)
    wait_until(lambda: server.gate.held == 1)
    assert pausing.is_alive(), "one request runs still"
    service.core.resume()
    assert pausing.result()[2] == {"paused": True, "running": 0}
    first = running.result()
    assert held.is_alive() and service.core.waiting == 0
    payload = pack(tensors_of(1))
    assert ask(port, "POST", f"/update_weights?version=1&sha256={digest(payload)}", payload, ADMIN)[0] == 200
    ask(port, "POST", "/resume", key=ADMIN)
    assert (first["weight_versions"], held.result()["weight_versions"]) == ([0, 0], [1, 1])


def test_a_pause_with_a_limit_ends_by_itself(served):
    port, _, _ = served(admin_key=ADMIN)
    assert ask(port, "POST", "/pause?seconds=0", key=ADMIN)[0] == 400
    ask(port, "POST", "/pause?seconds=1", key=ADMIN)
    greedy(port)


def test_an_update_in_parts_over_the_wire(served, tmp_path):
    path = tmp_path / "access.jsonl"
    port, _, _ = served(admin_key=ADMIN, log=AccessLog(path))
    new = tensors_of(1)
    before = greedy(port)
    ask(port, "POST", "/pause", key=ADMIN)
    waiting = InBackground(ask, port, "POST", "/v1/completions", {**BODY, "max_tokens": 40}, None)
    status, _, content = ask(port, "POST", "/start_weight_update?version=4&format=fp32", key=ADMIN)
    assert status == 200 and content["update"]["missing"] == len(new)
    names = sorted(new)
    for part in (names[::2], names[1::2]):
        payload = pack({name: new[name] for name in part})
        status, _, content = ask(port, "POST", f"/update_weights?sha256={digest(payload)}", payload, ADMIN)
        assert status == 200, content
    assert content["update"]["missing"] == 0
    flipped = bytearray(payload)
    flipped[-1] ^= 1
    assert ask(port, "POST", f"/update_weights?sha256={digest(payload)}", bytes(flipped), ADMIN)[0] == 400
    assert ask(port, "POST", "/start_weight_update?version=5", key=ADMIN)[0] == 409
    finish = f"/finish_weight_update?version=4&sha256={WeightSet.of(0, new).sha256}"
    for _ in range(2):
        status, _, content = ask(port, "POST", finish, key=ADMIN)
        assert (status, content["version"]) == (200, 4)
    ask(port, "POST", "/resume", key=ADMIN)
    assert waiting.result()[0] == 200
    after = greedy(port)
    assert after["weight_versions"] == [4, 4] and after["token_ids"] != before["token_ids"]
    assert metric(port, "isthmus:weight_updates_total") == 1 and metric(port, "isthmus:weight_version") == 4
    assert metric(port, "isthmus:refused_weight_updates_total") == 2
    events = [line["event"] for line in log_lines(path)]
    assert events.count("weight update") == 1 and events.count("weight update refused") == 2
    payload = pack(tensors_of(0))
    status, _, content = ask(port, "POST", f"/update_weights?version=5&sha256={digest(payload)}", payload, ADMIN)
    assert (status, content) == (200, {"version": 5, "sha256": digest(payload)}), "in one message, as RL sends it"
    assert greedy(port)["token_ids"] == before["token_ids"]


def test_a_sender_that_dies_in_a_message_changes_nothing(served):
    port, _, _ = served(admin_key=ADMIN)
    before = greedy(port)
    ask(port, "POST", "/start_weight_update?version=4", key=ADMIN)
    payload = pack(tensors_of(1))
    with socket.create_connection(("127.0.0.1", port)) as sender:
        lines = [
            f"POST /update_weights?version=4&sha256={digest(payload)} HTTP/1.1",
            "Host: localhost",
            f"Authorization: Bearer {ADMIN}",
            f"Content-Length: {len(payload)}",
        ]
        sender.sendall("\r\n".join([*lines, "", ""]).encode() + payload[: len(payload) // 2])
    info = ask(port, "GET", "/weight_info", key=ADMIN)[2]
    assert info["update"]["tensors"] == 0 and info["version"] == 0
    assert ask(port, "POST", "/finish_weight_update?version=4", key=ADMIN)[0] == 409
    assert greedy(port) == before
    assert ask(port, "POST", "/abort_weight_update", key=ADMIN)[2]["last_update"]["outcome"] == "abandoned"


def engine_process(bundle, *options):
    command = [sys.executable, "-m", "isthmus.engines.local", "--bundle", str(bundle), "--admin", *options]
    environment = {**os.environ, "ISTHMUS_ADMIN_KEY": ADMIN}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    return process, int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])


def finish(process):
    try:
        return process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.stdout.close()


def test_a_drain_lets_what_runs_end_and_takes_nothing_new(bundle):
    process, port = engine_process(bundle, "--drain-seconds", str(PATIENCE_S))
    try:
        ask(port, "POST", "/pause", key=ADMIN)
        running = InBackground(ask, port, "POST", "/v1/completions", {**BODY, "stream": True})
        wait_until(lambda: ask(port, "GET", "/health")[2]["waiting"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(port, "GET", "/ready")[2]["status"] == "draining")
        status, headers, content = ask(port, "POST", "/v1/completions", BODY)
        assert (status, headers["Retry-After"]) == (503, "1") and "about to stop" in content["error"]["message"]
        assert ask(port, "GET", "/health")[0] == 200 and process.poll() is None
        ask(port, "POST", "/resume", key=ADMIN)
        status, _, events = running.result()
        assert status == 200 and "error" not in events and events.endswith("data: [DONE]\n\n")
    finally:
        code = finish(process)
    assert code == 0


@pytest.mark.parametrize(("grace", "signals"), [("0.2", [signal.SIGINT]), ("600", [signal.SIGTERM, signal.SIGINT])])
def test_a_drain_that_takes_too_long_ends_with_an_error_event(bundle, grace, signals):
    process, port = engine_process(bundle, "--drain-seconds", grace)
    try:
        ask(port, "POST", "/pause", key=ADMIN)
        running = InBackground(ask, port, "POST", "/v1/completions", {**BODY, "stream": True})
        wait_until(lambda: ask(port, "GET", "/health")[2]["waiting"] == 1)
        process.send_signal(signals[0])
        if len(signals) > 1:
            wait_until(lambda: ask(port, "GET", "/ready")[2]["status"] == "draining")
            process.send_signal(signals[1])
        status, _, events = running.result()
        assert status == 200 and "server was stopped" in events and events.endswith("data: [DONE]\n\n")
    finally:
        code = finish(process)
    assert code == 0


def test_an_engine_beyond_this_machine_wants_keys(bundle):
    command = [sys.executable, "-m", "isthmus.engines.local", "--bundle", str(bundle), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2 and "ISTHMUS_API_KEYS" in done.stderr and "--allow-open" in done.stderr


def test_a_local_engine_says_why_it_has_no_compiled_layers(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/bin/false")
    with LocalEngine(bundle, log=tmp_path / "log", slots=4) as engine:
        assert engine.kernels.startswith("torch: /bin/false could not compile the kernels")


def test_a_local_engine_still_works_for_its_trainer_where_users_need_keys(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_API_KEYS", f"alice {USER}")
    with LocalEngine(bundle, log=tmp_path / "log", slots=4) as engine:
        payload = pack(tensors_of(1))
        engine.update(payload, 3, digest(payload))
        found = engine.generate([[5, 6, 7]], Sampling(4))
        assert found[0][0].version == 3
        stranger = HttpEngine(engine.url)
        with pytest.raises(EngineError, match="401"):
            stranger.generate([[5, 6, 7]], Sampling(4))
