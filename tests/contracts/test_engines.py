"""What every engine must keep: reproducible samples with true log-probabilities, versioned weights, and a clean end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from isthmus.engines import EngineError, Sampling
from isthmus.engines.local import LocalEngine
from isthmus.engines.remote import HttpEngine
from isthmus.formats import get_format
from isthmus.formats.updates.wire import digest, pack
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle

PROMPTS = [[0, 2, 60, 61, 4], [0, 2, 70, 4], [9] * 20]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "w8a8"
    write_small_bundle(folder, "w8a8")
    return folder


@pytest.fixture(scope="module")
def local(bundle):
    with LocalEngine(bundle, log=bundle.parent / "engine.log", slots=16) as engine:
        yield engine


@pytest.fixture(params=["local", "remote"])
def engine(request, local, bundle):
    if request.param == "local":
        return local
    remote = HttpEngine(local.url, api_key=local.api_key)
    remote.start(bundle)
    return remote


def payload_of(seed, format_name="w8a8"):
    """Other weights for the same bundle, and the model that they make."""
    model = thinking_model(small_tokenizer(), seed)
    chosen = get_format(format_name)
    tensors = chosen.export(model.state_dict(), model.architecture)
    return pack(tensors), chosen.build(model.architecture, tensors)


def test_given_sequences_are_scored_token_by_token(engine):
    payload, model = payload_of(0)
    engine.update(payload, 4, digest(payload))
    for sequence, found in zip(PROMPTS, engine.score(PROMPTS), strict=True):
        rows = torch.log_softmax(model(torch.tensor([sequence]))[0, :-1].double(), -1)
        own = rows.gather(-1, torch.tensor(sequence[1:])[:, None]).squeeze(-1)
        # A value on the other side of an int8 rounding moves a log-probability by a step, here and there.
        apart = (torch.tensor([one.logprob for one in found]) - own).abs()
        assert apart.median() < 1e-4 and apart.max() < 0.1
        agree = sum(one.best == best for one, best in zip(found, rows.argmax(-1).tolist(), strict=True))
        assert agree >= len(found) - 1
        assert all(one.best_logprob >= one.logprob for one in found)


def test_completions_come_in_order_with_the_logprobs_of_the_sampled_distribution(engine):
    payload, model = payload_of(0)
    engine.update(payload, 3, digest(payload))
    found = engine.generate(PROMPTS, Sampling(12, temperature=0.8, seed=5, n=3))
    assert [len(group) for group in found] == [3, 3, 3]
    for prompt, group in zip(PROMPTS, found, strict=True):
        for one in group:
            assert len(one.tokens) == len(one.logprobs) and 1 <= len(one.tokens) <= 12
            assert one.finish_reason == ("length" if len(one.tokens) == 12 else "stop")
            assert (one.version, one.last_version) == (3, 3)
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *one.tokens]]))[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits / 0.8, -1)[torch.arange(len(one.tokens)), torch.tensor(one.tokens)]
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=5e-3, rtol=1e-3)


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(engine):
    alone = engine.generate(PROMPTS[1:2], Sampling(20, n=2), seeds=[77])
    together = engine.generate(PROMPTS, Sampling(20, n=2), seeds=[1, 77, 3])
    assert [one.tokens for one in together[1]] == [one.tokens for one in alone[0]]
    assert alone[0][0].tokens != alone[0][1].tokens
    other = engine.generate(PROMPTS[1:2], Sampling(20, n=2), seeds=[78])
    assert other[0][0].tokens != alone[0][0].tokens


def test_an_update_changes_what_is_generated_and_a_damaged_one_changes_nothing(engine):
    sampling = Sampling(16, temperature=0.0)
    first, _ = payload_of(0)
    engine.update(first, 10, digest(first))
    before = engine.generate(PROMPTS, sampling)
    second, _ = payload_of(1)
    engine.update(second, 11, digest(second))
    after = engine.generate(PROMPTS, sampling)
    assert [g[0].tokens for g in after] != [g[0].tokens for g in before]
    assert {g[0].version for g in before} == {10} and {g[0].version for g in after} == {11}
    flipped = bytearray(first)
    flipped[len(first) // 2] ^= 1
    wrong_format, _ = payload_of(0, "bf16")
    for payload, sha256, reason in (
        (bytes(flipped), digest(first), "SHA-256"),
        (wrong_format, digest(wrong_format), "do not fit"),
        (b"not weights", digest(b"not weights"), "safetensors"),
    ):
        with pytest.raises(EngineError, match=reason):
            engine.update(payload, 12, sha256)
    still = engine.generate(PROMPTS, sampling)
    assert [g[0].tokens for g in still] == [g[0].tokens for g in after] and still[0][0].version == 11


def test_an_update_in_the_middle_of_a_generation_is_told(engine):
    payloads = [payload_of(seed)[0] for seed in (0, 1)]
    engine.update(payloads[0], 20, digest(payloads[0]))
    groups = []
    generating = threading.Thread(
        target=lambda: groups.extend(engine.generate([[5, 6, 7]] * 4, Sampling(90, n=8, temperature=1.5)))
    )
    generating.start()
    version = 20
    while generating.is_alive():
        version += 1
        engine.update(payloads[version % 2], version, digest(payloads[version % 2]))
    generating.join()
    samples = [one for group in groups for one in group]
    assert len(samples) == 32 and all(20 <= one.version <= one.last_version <= version for one in samples)
    assert any(one.version < one.last_version for one in samples)


def test_what_the_engine_refuses_is_an_error_with_its_reason(engine):
    with pytest.raises(EngineError, match="maximum context length is 96 tokens"):
        engine.generate([[5] * 90], Sampling(20))
    with pytest.raises(EngineError, match="token ids must be between"):
        engine.generate([[5, 100_000]], Sampling(2))
    assert engine.generate([], Sampling(4)) == []


def test_weights_can_be_exchanged_only_with_the_key(local):
    payload, _ = payload_of(1)
    for key in (None, "guess"):
        with pytest.raises(EngineError, match="401"):
            HttpEngine(local.url, api_key=key).update(payload, 99, digest(payload))


def test_an_engine_that_dies_says_why_and_can_be_started_again(local, bundle):
    os.kill(local.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"ended with code -9"):
        local.generate(PROMPTS, Sampling(4))
    local.start(bundle)
    assert len(local.generate(PROMPTS, Sampling(4))) == 3


def test_an_engine_that_cannot_start_repeats_its_own_words(tmp_path):
    log = tmp_path / "log" / "engine.log"
    with pytest.raises(EngineError, match=r"could not start \(exit code 2\)(?s:.)*is not a bundle"):
        LocalEngine(tmp_path, log=log).start(tmp_path)


PARENT = """
import sys
from pathlib import Path
from isthmus.engines.local import LocalEngine
engine = LocalEngine(Path(sys.argv[1]), log=Path(sys.argv[2]))
engine.start(engine.bundle_folder)
print(engine.pid, flush=True)
sys.stdin.read()
"""


def test_an_engine_without_a_compiler_says_so_and_generates(local, bundle, tmp_path, monkeypatch):
    assert local.kernels == "native"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    with LocalEngine(bundle, log=tmp_path / "engine.log") as slow:
        assert slow.kernels.startswith("torch: ") and "no-such-compiler" in slow.kernels
        assert len(slow.generate([[11, 60, 7]], Sampling(12, temperature=0.0))[0][0].tokens) > 0


def test_a_killed_parent_leaves_no_engine_behind(bundle, tmp_path):
    command = [sys.executable, "-c", PARENT, str(bundle), str(tmp_path / "engine.log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        parent.wait()
        end = time.monotonic() + 10
        while is_running(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_running(child)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def test_no_server_and_no_url_are_errors(tmp_path):
    with pytest.raises(EngineError, match="does not answer"):
        HttpEngine("http://127.0.0.1:9", start_wait_s=0.0).start(tmp_path)
    with pytest.raises(EngineError, match="is not the URL"):
        HttpEngine("localhost:8000").start(tmp_path)
