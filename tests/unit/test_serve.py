"""Serving a run: only what a gate has passed and nobody has touched since, on a port that is free."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from isthmus.chips.rehearse import RehearsalRefused
from isthmus.engines.local.api.keys import Keyring
from isthmus.engines.local.api.metrics import Metrics
from isthmus.engines.local.api.service import rehearse_steps
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.files.golden import make_golden, write_golden
from isthmus.model.attention import LatentAttention
from isthmus.parity.manifest import add_file
from isthmus.parity.seal import Lineage, write_seal
from isthmus.parity.signing import new_key
from isthmus.pools import get_pool
from isthmus.progress import Watch
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import ServeSection
from isthmus.records import HandoffRecord, ParityVerdict, Placement, PlanRecord
from isthmus.run import RunFolder
from isthmus.stages import serve
from tests.support.bundles import passed
from tests.support.engine_bundle import write_small_bundle
from tests.support.flow_recipe import RECIPE
from tests.support.live_server import ask, live

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
    write_golden(folder, make_golden(read_bundle(folder), GOLDEN_PROMPTS, tokenizer.ends))
    record = HandoffRecord(recipe_sha256=digest, **PARITY)
    seal = write_seal(folder, **passed(lineage=Lineage(checkpoint_sha256="c" * 64)))
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
        seal = json.loads((run.path / "bundle" / "w8a8" / "seal.json").read_text())
        assert sum(health["checks"].values()) == len(seal["checks"]) and set(health["checks"]) <= {
            "pass",
            "caution",
            "unknown",
        }
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


def unprivileged():
    """For a process that root starts: it may write no more than the owner of a file may (capability 1 of Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0)


def test_a_run_folder_that_cannot_be_written_is_served_and_inspected(run, tmp_path):
    before = run.events()
    folders = [run.path, *(path for path in run.path.rglob("*"))]
    for path in folders:
        path.chmod(0o555 if path.is_dir() else 0o444)
    options = {"env": {**os.environ, "COLUMNS": "150"}, "preexec_fn": unprivileged, "text": True}
    inspected = subprocess.run(
        [sys.executable, "-m", "isthmus", "inspect", str(run.path)], capture_output=True, check=False, **options
    )
    assert inspected.returncode == 0 and "sealed" in inspected.stdout, inspected.stderr
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "isthmus", "serve", str(run.path), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    try:
        wait_for_health(port, process)
        assert ask(port, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        status, _, ready = ask(port, "GET", "/ready")
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[0]
        for path in folders:
            path.chmod(0o755)
    assert process.returncode == 0, said
    assert status == 200 and "cannot be written; --access-log" in ready["access_log"]
    assert "not among the run's events" in said and run.events() == before


def served(folder: Path, **changes) -> tuple[dict, str, str]:
    """/health, /metrics and the fingerprint of a bundle that is served although no seal vouches for it."""
    loud = serve.Serving(section=ServeSection(allow_unsealed=True, access_log="none"), threads=1, **changes)
    service = serve.open_service(folder, loud)
    with live(serve.open_server(folder, service, loud, Keyring([]), Watch())) as port:
        health = ask(port, "GET", "/health")[2]
        page = ask(port, "GET", "/metrics")[2]
    return health, page, service.fingerprint


def refuse(folder: Path) -> None:
    verdict = ParityVerdict(
        verdict="refuse", target="npu0", rehearsed=False, checks=[], ledger=[], culprit="model.layers.1.mlp",
        operator=None, isthmus="0", torch="0", started=0.0, ended=1.0,
    )  # fmt: skip
    add_file(folder, "verdict.json", verdict.model_dump_json().encode())


def tamper(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(path.read_text() + " ")


STATES = {
    "unsealed": (lambda folder: (folder / "seal.json").unlink(), "not sealed"),
    "tampered": (tamper, r"generation_config\.json does not match"),
    "refused": (refuse, r"refused .*: model\.layers\.1\.mlp"),
}


@pytest.mark.parametrize("state", STATES)
def test_what_no_seal_vouches_for_is_refused_or_served_loudly(run, state, capsys):
    folder = run.path / "bundle" / "w8a8"
    change, message = STATES[state]
    change(folder)
    with pytest.raises(GateRefused, match=message):
        serve.execute_bundle(folder, Watch(), port=0)
    health, page, fingerprint = served(folder)
    assert (health["state"], health["seal"], health["signer"]) == (state, None, None)
    assert fingerprint == f"{state}-v0"
    assert re.search(rf'isthmus:bundle_state{{[^}}]*signer="",state="{state}"}} 1.0', page)
    assert page.count("isthmus:bundle_state{") == 5 and len(re.findall(r"isthmus:bundle_state{[^}]*} 1.0", page)) == 1
    assert re.search(r"isthmus:unsealed{[^}]*} 1.0", page) and re.search(r"isthmus:sealed_weights{[^}]*} 0.0", page)
    assert state.upper() in capsys.readouterr().out


def test_a_run_whose_gate_refused_is_served_as_refused(run):
    folder = run.path / "bundle" / "w8a8"
    assert served(folder, refused=True)[0]["state"] == "refused"
    record = run.read_record("parity", HandoffRecord)
    run.write_record("parity", record.model_copy(update={"verdict": "refuse"}))
    with pytest.raises(GateRefused, match="parity gate refused"):
        serve.execute(run, Watch(), port=0)


def test_a_server_that_trusts_someone_serves_what_they_signed(run, tmp_path):
    folder, listed = run.path / "bundle" / "w8a8", tmp_path / "trusted"
    public, other = new_key(tmp_path / "gate.pem"), new_key(tmp_path / "other.pem")
    listed.write_text(f"{public} the gate\n")
    with pytest.raises(GateRefused, match="is not signed"):
        serve.execute_bundle(folder, Watch(), trusted_keys=listed, port=0)
    seal = write_seal(folder, **passed(), sign_key=tmp_path / "gate.pem")
    serving = serve.Serving(section=ServeSection(trusted_keys=listed), threads=1)
    service = serve.open_service(folder, serving)
    service.core.stop()
    assert (service.identity.state, service.identity.signer, service.identity.seal) == ("sealed", public, seal.id)
    assert f'signer="{public}",state="sealed"}} 1.0' in Metrics(service).page().decode()
    listed.write_text(other)
    with pytest.raises(GateRefused, match="not trusted"):
        serve.open_service(folder, serving)
    loud = ServeSection(trusted_keys=listed, allow_unsealed=True)
    service = serve.open_service(folder, serve.Serving(section=loud, threads=1))
    service.core.stop()
    assert (service.identity.state, service.identity.seal, service.is_sealed) == ("untrusted", None, False)


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
    write_seal(folder, **passed(lineage=Lineage(checkpoint_sha256="d" * 64)))
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
