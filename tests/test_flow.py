"""The whole story on a smaller recipe, as a user runs it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from isthmus.engines import Sampling
from isthmus.engines.local import LocalEngine
from isthmus.records import HandoffRecord, PlanRecord, QualifyRecord, RlRecord, read_weights
from isthmus.run import RunFolder
from tests.support.examples import example
from tests.support.flow_recipe import RECIPE, REINFORCED, ROOT, TAUGHT, command, isthmus, settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("flow") / "run"
    result = example(
        "rl_elsewhere_train.sh", RECIPE, REINFORCED, folder.parent / "published", "--run", folder, *settings()
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


def test_every_stage_leaves_its_record(finished):
    run = RunFolder.open(finished[0])
    home, away = (run.read_record(f"qualify/{pool}", QualifyRecord) for pool in ("home", "away"))
    assert home.verdict == "fit" and home.present and not home.rehearsed
    assert away.verdict == "serve-only" and away.rehearsed and "rehears" in away.title.lower()
    plan = run.read_record("plan", PlanRecord)
    assert [plan.pool_of(stage) for stage in ("train", "rollout", "serve")] == ["home", "away", "away"]
    assert any(r.stage == "train" and r.pool == "away" and "rehears" in r.reason for r in plan.rejected)
    assert read_weights(run, TAUGHT).steps == 80
    rl = run.require_record(f"steps/{REINFORCED}/record", RlRecord, "run")
    assert rl.steps == rl.weight_version == 12 and rl.rollout_rehearsed
    parity = run.read_record("parity", HandoffRecord)
    assert parity.verdict == "pass" and parity.seal_id


def test_no_figure_of_the_rehearsed_pool_is_called_measured(finished):
    run = RunFolder.open(finished[0])
    away = run.read_record("qualify/away", QualifyRecord)
    figures = [figure for evidence in away.evidence for figure in evidence.figures.values()] + list(
        away.figures.values()
    )
    assert figures and all(figure.kind != "measured" for figure in figures)
    rl = run.require_record(f"steps/{REINFORCED}/record", RlRecord, "run")
    assert {rl.accuracy_before.kind, rl.accuracy_after.kind, rl.accuracy_gain.kind} == {"rehearsed"}


def test_the_weights_cross_at_every_step_with_a_version_and_a_hash(finished):
    events = RunFolder.open(finished[0]).events(REINFORCED, "step")
    assert [event["weight_version"] for event in events] == list(range(1, 13))
    assert len({event["weight_sha256"] for event in events}) >= 6
    assert all(0 < event["update_bytes"] < event["update_full_bytes"] for event in events), (
        "changes cross, not all weights"
    )
    assert max(event["parity_gap"] for event in events) < 0.02, "the engine computes what the emulator does"
    gaps = [event["mismatch_abs"] for event in events if "mismatch_abs" in event]
    assert gaps and all(0 < gap < 0.05 for gap in gaps)


def test_the_report_is_one_file_without_network(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "rehearsed" in page and "seal" in page.lower()


def test_an_engine_elsewhere_follows_what_was_published(finished, tmp_path):
    with LocalEngine(finished[0] / "bundle" / "w8a8", log=tmp_path / "engine.log") as engine:
        (tmp_path / "key").write_text(engine.api_key)
        followed = example(
            "rl_elsewhere_engine.sh", finished[0].parent / "published", engine.url, tmp_path / "key", "--once"
        )
        assert followed.returncode == 0, followed.stdout + followed.stderr
        assert engine.generate([[0]], Sampling(1))[0][0].version == 12


def test_a_second_run_skips_everything_and_is_quick(finished):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*.safetensors")}
    result = isthmus("run", finished[0])
    assert result.returncode == 0
    assert result.stdout.count("skipped") == 5 and "held-out problems right before RL" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*.safetensors")} == before


def test_another_recipe_does_not_touch_the_run(finished):
    result = isthmus("run", RECIPE, "--run", finished[0], *settings(sft__steps=81))
    assert result.returncode == 2 and "step.cold-start.steps" in result.stderr


def test_serve_answers_and_stops(finished, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        command("serve", finished[0], "--port", port),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    try:
        health = wait_for(f"http://127.0.0.1:{port}/health", server)
        assert health
        body = json.dumps({"messages": [{"role": "user", "content": "Make 6 from 1 2 3."}], "max_tokens": 12}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
        assert answer["usage"]["completion_tokens"] >= 1
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).read().decode()
        assert "<html" in page
        busy = isthmus("serve", finished[0], "--port", port)
        assert busy.returncode == 2 and str(port) in busy.stderr
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen, seconds: float = 60) -> bytes:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, server.stdout.read()
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not come up")


def test_a_tampered_bundle_is_not_served(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    weights = copy / "bundle" / "w8a8" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    result = isthmus("serve", copy, "--port", 0, timeout=60)
    assert result.returncode == 1 and "does not match its hash" in result.stderr


def test_a_gate_that_refuses_seals_nothing_and_exits_1(tmp_path):
    folder = tmp_path / "strict"
    result = isthmus("run", RECIPE, "--run", folder, *settings(handoff__max_mean_kl=1e-12, sft__steps=6, rl__steps=1))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "kl" in (result.stdout + result.stderr).lower()
    record = RunFolder.open(folder).read_record("parity", HandoffRecord)
    assert record.verdict == "refuse" and record.seal_id is None
    assert not list(folder.rglob("seal.json"))
    assert isthmus("serve", folder, "--port", 0).returncode == 1
