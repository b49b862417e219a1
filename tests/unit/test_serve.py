"""Serving a run: only what a gate has passed and nobody has touched since, on a port that is free."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from engine_bundle import write_small_bundle
from flow_recipe import RECIPE
from live_server import ask

from isthmus import serve
from isthmus.chips.rehearse import RehearsalRefused
from isthmus.engines.local.service import rehearse_steps
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats.bundle import read_bundle
from isthmus.formats.golden import make_golden, write_golden
from isthmus.model.attention import LatentAttention
from isthmus.parity.seal import Lineage, write_seal
from isthmus.pools import get_pool
from isthmus.progress import Watch
from isthmus.recipe import ServeSection, load_recipe
from isthmus.records import HandoffRecord, Placement, PlanRecord
from isthmus.run import RunFolder

GOLDEN_PROMPTS = [[0, 2, 60, 61, 4], [0, 2, 70, 4], [9] * 20]
PARITY = {
    "started": 0.0,
    "ended": 1.0,
    "source_pool": "home",
    "target_pool": "away",
    "format": "w8a8",
    "verdict": "pass",
    "checks": [],
    "bundles": {"w8a8": "bundle/w8a8"},
    "seal_id": None,
    "figures": {},
}


@pytest.fixture
def run(tmp_path):
    """A run whose hand-off passed; its bundle is small and random."""
    opened = RunFolder.create(tmp_path / "run", load_recipe(RECIPE))
    digest = opened.recipe.digest()
    folder = opened.path / "bundle" / "w8a8"
    folder.parent.mkdir()
    _, tokenizer = write_small_bundle(folder, "w8a8")
    write_golden(folder, make_golden(read_bundle(folder), GOLDEN_PROMPTS, tokenizer.eos_id))
    record = HandoffRecord(recipe_sha256=digest, **PARITY)
    seal = write_seal(folder, verdict="pass", lineage=Lineage(checkpoint_sha256="c" * 64))
    opened.write_record("parity", record.model_copy(update={"seal_id": seal.id}))
    placement = Placement(stage="serve", pool="away", reason="first choice")
    plan = PlanRecord(recipe_sha256=digest, started=0.0, ended=1.0, placements=[placement], rejected=[], estimate={})
    opened.write_record("plan", plan)
    return opened


def test_a_run_is_served_until_it_is_told_to_stop(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "isthmus", "serve", str(run.path), "--port", str(port)]
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "COLUMNS": "150"})
    try:
        health = wait_for_health(port, process)
        assert health["rehearsal"]["statement"] == "rehearsed on CPU with the rules of ascend-910b-313t"
        assert health["rehearsal"]["operators"]["native"] > 100 and health["pool"] == "away"
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        assert answer["system_fingerprint"] == f"{health['seal']}-v0" and answer["model"] == "tiny"
        connection.request("GET", "/examples")
        assert len(json.loads(connection.getresponse().read())) == serve.EXAMPLES
        connection.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    said = output.read_text()
    assert process.returncode == 0, said
    assert f"http://127.0.0.1:{port}/" in said and "curl" in said and "rehearsed on CPU" in said
    assert [event["event"] for event in run.events("serve")] == ["start", "end"]


def serve_process(output, *words):
    """`isthmus serve` on a free port, and that port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "isthmus", "serve", *map(str, words), "--port", str(port)]
    with output.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "COLUMNS": "150"}), port


def test_a_bundle_is_served_without_its_run_and_with_keys(run, tmp_path):
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text("alice sk-alice\nadmin sk-root\n")
    keys.chmod(0o600)
    words = [run.path / "bundle" / "w8a8", "--key-file", keys, "--access-log", log, "--on-drift", "rollback"]
    process, port = serve_process(tmp_path / "output", *words, "--set", "serve.max_batch=2")
    try:
        health = wait_for_health(port, process)
        assert health["model"] == "w8a8" and health["pool"] is None and health["seal"]
        body = {"prompt": "a", "max_tokens": 2}
        assert ask(port, "POST", "/v1/completions", body)[0] == 401
        assert ask(port, "POST", "/v1/completions", body, "sk-alice")[0] == 200
        report = ask(port, "POST", "/canary/run", key="sk-root")[2]["last"]
        assert (report["outcome"], report["prompts"]) == ("ok", len(GOLDEN_PROMPTS))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert process.returncode == 0, (tmp_path / "output").read_text()
    assert "Bearer KEY" in (tmp_path / "output").read_text()
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("request") == 3 and "canary" in events and events[-1] == "drain"
    assert not (run.path / "bundle" / "w8a8" / "serve").exists(), "a bundle keeps only what is sealed"


def test_an_unsealed_bundle_is_served_only_loudly_and_never_a_damaged_one(run, tmp_path):
    write_small_bundle(tmp_path / "plain")
    with pytest.raises(GateRefused, match="not sealed"):
        serve.execute_bundle(tmp_path / "plain", Watch(), port=0)
    loud = serve.Serving(section=ServeSection(allow_unsealed=True), threads=1)
    service = serve.open_service(tmp_path / "plain", loud)
    service.core.stop()
    assert service.fingerprint == "unsealed-v0"
    folder = run.path / "bundle" / "w8a8"
    content = json.loads((folder / "seal.json").read_text())
    (folder / "seal.json").write_text(json.dumps({**content, "torch": "0"}))
    with pytest.raises(GateRefused, match="does not match its own hash"):
        serve.open_service(folder, loud)
    (folder / "seal.json").unlink()
    with pytest.raises(GateRefused, match="not sealed"):
        serve.execute(run, Watch(), allow_unsealed=True, port=0)


def test_options_of_the_section_reach_the_service(run):
    section = ServeSection(max_batch=3, max_new_tokens=5, temperature=0.25, max_waiting=7, max_waiting_tokens=70)
    service = serve.open_service(run.path / "bundle" / "w8a8", serve.Serving(section=section, threads=1))
    service.core.stop()
    assert (service.core.slots, service.default_tokens, service.default_temperature) == (3, 5, 0.25)
    assert (service.max_waiting, service.max_waiting_tokens) == (7, 70)


def test_a_server_for_other_machines_wants_keys(run, monkeypatch):
    monkeypatch.delenv("ISTHMUS_API_KEYS", raising=False)
    with pytest.raises(IsthmusError, match="--allow-open"):
        serve.execute(run, Watch(), host="0.0.0.0", port=0)


def wait_for_health(port, process):
    end = time.monotonic() + 40
    while True:
        assert process.poll() is None and time.monotonic() < end
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())
        except ConnectionRefusedError:
            time.sleep(0.1)
        finally:
            connection.close()


def test_a_tampered_bundle_is_refused(run):
    weights = run.path / "bundle" / "w8a8" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    with pytest.raises(GateRefused, match="does not match its hash"):
        serve.execute(run, Watch(), port=0)


def test_a_bundle_with_another_seal_is_refused(run):
    folder = run.path / "bundle" / "w8a8"
    write_seal(folder, verdict="pass", lineage=Lineage(checkpoint_sha256="d" * 64))
    with pytest.raises(GateRefused, match="another bundle"):
        serve.execute(run, Watch(), port=0)


def test_a_run_without_a_passed_gate_is_not_served(run):
    record = HandoffRecord(recipe_sha256=run.recipe.digest(), **{**PARITY, "verdict": "refuse"})
    run.write_record("parity", record)
    with pytest.raises(GateRefused, match="parity gate refused"):
        serve.execute(run, Watch(), port=0)
    (run.path / "parity.json").unlink()
    with pytest.raises(IsthmusError, match="isthmus handoff"):
        serve.execute(run, Watch(), port=0)


def test_a_taken_port_is_named_before_anything_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(IsthmusError, match=rf"port {port} .*--port"):
            serve.execute(run, Watch(), port=port)
    assert run.events("serve") == []


def test_a_pool_of_real_chips_is_not_served_on_the_cpu_in_silence():
    recipe = load_recipe(RECIPE, ("pools.home.chip=h800-sxm", "pools.away.chip=h800-sxm"))
    with pytest.raises(IsthmusError, match="vllm serve"):
        serve.require_cpu(get_pool(recipe, "home"))
    serve.require_cpu(get_pool(recipe, "away"))


def test_a_model_that_breaks_the_rules_of_the_chip_does_not_start(run, monkeypatch):
    service = serve.open_service(run.path / "bundle" / "w8a8", serve.Serving(threads=1))
    model = service.core.runner.model
    service.core.stop()
    assert rehearse_steps(model, "ascend-910b-313t")["native"] > 100
    plain = LatentAttention.latents
    monkeypatch.setattr(
        LatentAttention, "latents", lambda self, *args: plain(self, *args).to(torch.float8_e4m3fn).float()
    )
    with pytest.raises(RehearsalRefused, match="float8"):
        rehearse_steps(model, "ascend-910b-313t")
