"""Versions of weights on their way to a running engine: over HTTP, and through a folder with `isthmus follow`."""

from __future__ import annotations

import shutil

import pytest
import torch
from click.testing import CliRunner

from isthmus.cli import cli
from isthmus.engines import EngineError, OtherBase, Sampling
from isthmus.engines.channel import Channel
from isthmus.engines.local import LocalEngine
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.transport import Transport
from isthmus.errors import IsthmusError
from isthmus.formats import get_format
from isthmus.formats.updates.delta import WeightSet, encode
from isthmus.formats.updates.publisher import Publisher
from isthmus.formats.updates.version_folder import Lost, VersionWriter
from isthmus.formats.updates.wire import digest, pack
from isthmus.tools import follow
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle

PROMPTS = [[0, 2, 60, 61, 4], [0, 2, 70, 4]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channel") / "w8a8"
    write_small_bundle(folder, "w8a8")
    return folder


@pytest.fixture(scope="module")
def engine(bundle):
    with LocalEngine(bundle, log=bundle.parent / "engine.log", slots=8) as found:
        yield found


def tensors_at(version):
    """A model that moves a little in some of its weights at each version."""
    model = thinking_model(small_tokenizer())
    generator = torch.Generator().manual_seed(version)
    state = {
        name: tensor + 0.05 * version * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    return get_format("w8a8").export(state, model.architecture)


def greedy(engine):
    answers = engine.generate(PROMPTS, Sampling(8, temperature=0.0))
    return [(group[0].tokens, group[0].logprobs, group[0].version) for group in answers]


def expected(version):
    """What an engine must say after this version, by the model of the format."""
    model = thinking_model(small_tokenizer())
    model = get_format("w8a8").build(model.architecture, tensors_at(version))
    found = []
    for prompt in PROMPTS:
        written, logprobs = [], []
        while len(written) < 8 and written[-1:] != [small_tokenizer().eos_id]:
            with torch.no_grad():
                scores = torch.log_softmax(model(torch.tensor([[*prompt, *written]]))[0, -1], -1)
            written.append(int(scores.argmax()))
            logprobs.append(scores.max().item())
        found.append((written, pytest.approx(logprobs, abs=1e-4), version))
    return found


def sha_at(version):
    return WeightSet.of(0, tensors_at(version)).sha256


def start_at(engine, version):
    """Bring the engine to a version by a full update; the set of weights that it then has."""
    payload = pack(tensors_at(version))
    engine.update(payload, version, digest(payload))
    return WeightSet.of(version, tensors_at(version))


def transport_to(engine):
    return Transport(engine.url, engine.api_key, engine.timeout_s)


def info(engine):
    return transport_to(engine).get("/weight_info")


def test_a_channel_sends_deltas_between_snapshots_and_the_engine_computes_each_version(engine):
    told = []
    channel = Channel(engine, deltas=True, snapshot_every=3, tell=lambda *event, **facts: told.append(facts))
    kinds = []
    for version in range(10, 15):
        sent = channel.send(version, tensors_at(version))
        kinds.append(sent.kind)
        assert sent.sha256 == sha_at(version) and greedy(engine) == expected(version)
        if sent.kind == "delta":
            assert sent.sent_bytes < sent.full_bytes and info(engine)["sha256"] == sent.sha256
    assert kinds == ["snapshot", "delta", "delta", "snapshot", "delta"] and told == []


def test_an_engine_with_other_weights_gets_all_of_them_and_it_is_told(engine):
    told = []
    channel = Channel(engine, deltas=True, snapshot_every=100, tell=lambda name, **facts: told.append((name, facts)))
    channel.send(20, tensors_at(20))
    start_at(engine, 3)
    sent = channel.send(21, tensors_at(21))
    assert (sent.kind, channel.fallbacks) == ("fallback", 1)
    assert told[0][0] == "fallback" and "version 21 instead of a delta" in told[0][1]["what"]
    assert greedy(engine) == expected(21)
    payload = pack(tensors_at(5))
    engine.update(payload, 21, digest(payload))
    assert channel.send(22, tensors_at(22)).kind == "fallback", "the same number, but other weights"
    assert greedy(engine) == expected(22)
    assert channel.send(23, tensors_at(23)).kind == "delta"


def test_a_refused_delta_leaves_the_old_weights_in_use(engine):
    base, new = start_at(engine, 30), WeightSet.of(31, tensors_at(31))
    before = greedy(engine)
    parts = encode(base, new, part_bytes=4000)
    assert len(parts) > 3
    with pytest.raises(OtherBase):
        engine.update_delta(encode(WeightSet.of(30, tensors_at(29)), new), 30, 31, new.sha256)
    damaged = bytearray(parts[1])
    damaged[len(damaged) // 2] ^= 1
    for wrong, sha256 in (([parts[0], bytes(damaged)], new.sha256), (parts[:2], new.sha256), (parts, "0" * 64)):
        with pytest.raises(EngineError, match="refused"):
            engine.update_delta(wrong, 30, 31, sha256)
        assert greedy(engine) == before and info(engine)["update"] is None
    engine.update_delta(parts, 30, 31, new.sha256)
    assert greedy(engine) == expected(31)


def test_nothing_of_a_delta_is_seen_before_its_end(engine):
    base, new = start_at(engine, 40), WeightSet.of(41, tensors_at(41))
    before, transport = greedy(engine), transport_to(engine)
    transport.post("/start_weight_update?version=41&mode=delta&base_version=40")
    for part in encode(base, new, part_bytes=4000) * 2:
        transport.call("POST", f"/update_weights?sha256={digest(part)}", part, "application/octet-stream")
        assert greedy(engine) == before
    transport.post(f"/finish_weight_update?version=41&sha256={new.sha256}")
    assert greedy(engine) == expected(41)


def test_a_version_without_a_change_only_changes_its_number(engine):
    base = start_at(engine, 50)
    same = WeightSet.of(51, tensors_at(50))
    parts = encode(base, same)
    engine.update_delta(parts, 50, 51, same.sha256)
    assert [version for *_, version in greedy(engine)] == [51, 51]


def publish(folder, versions, publisher=None):
    publisher = publisher or Publisher(snapshot_every=3)
    writer = VersionWriter(folder, "w8a8")
    for version in versions:
        writer.write(publisher.publish(version, tensors_at(version)))
    return publisher


def test_a_follower_brings_versions_in_order_and_goes_on_after_a_crash_and_a_lost_file(engine, tmp_path):
    start_at(engine, 90)
    said = []
    publisher = publish(tmp_path, [60, 61])
    follower = follow.Follower(tmp_path, engine, said.append)
    assert follower.catch_up() == 0 and greedy(engine) == expected(61)
    publish(tmp_path, [62], publisher)
    assert follower.catch_up() == 0 and greedy(engine) == expected(62)
    assert "version 62  delta" in said[-1]
    again = follow.Follower(tmp_path, engine, said.append)
    publish(tmp_path, [63, 64], publisher)
    (tmp_path / "versions" / "000064.delta").unlink()
    assert again.catch_up() == 1 and greedy(engine) == expected(63)
    assert "1 behind at version 63" in said[-1] and "next snapshot" in said[-1]
    publish(tmp_path, [65, 66], publisher)
    assert again.catch_up() == 0 and greedy(engine) == expected(66)
    start_at(engine, 91)
    publish(tmp_path, [67], publisher)
    assert again.catch_up() == 0 and greedy(engine) == expected(67)
    assert any("other weights" in line for line in said) and "snapshot instead of a delta" in said[-1]


def test_a_server_that_reads_whole_weights_gets_them_put_together(engine, tmp_path, monkeypatch):
    """The follower's own copy is complete: what another make of server is handed is the version itself."""
    said, publisher = [], publish(tmp_path, [70])
    follower = follow.Follower(tmp_path, engine, said.append)
    follower.catch_up()
    monkeypatch.setattr(HttpEngine, "takes_deltas", False)
    publish(tmp_path, [71], publisher)
    assert follower.catch_up() == 0 and "put together from a delta" in said[-1]
    assert info(engine)["sha256"] == digest(pack(tensors_at(71))) and greedy(engine) == expected(71)


def test_the_command_follows_once(engine, tmp_path):
    key = tmp_path / "key"
    key.write_text(f"{engine.api_key}\n")
    publish(tmp_path / "versions", [80, 81])
    words = ["follow", str(tmp_path / "versions"), "--engine", engine.url, "--once"]
    done = CliRunner().invoke(cli, [*words, "--api-key-file", str(key)], catch_exceptions=False)
    assert done.exit_code == 0 and "version 81" in done.output, done.output
    assert greedy(engine) == expected(81)
    refused = CliRunner().invoke(cli, [*words, "--api-key-file", str(tmp_path / "none")])
    assert isinstance(refused.exception, IsthmusError) and "--api-key-file" in str(refused.exception)
    shutil.rmtree(tmp_path / "versions" / "snapshots")
    lost = CliRunner().invoke(cli, [*words, "--api-key-file", str(key)])
    assert isinstance(lost.exception, Lost)
