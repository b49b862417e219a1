"""Versions on their way: lost, doubled and damaged messages end in the sender's weights, or in a clear word."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from engine_bundle import small_tokenizer, thinking_model, write_small_bundle

from isthmus import follow
from isthmus.engines import EngineError, Sampling
from isthmus.engines.channel import Channel
from isthmus.engines.local import LocalEngine
from isthmus.engines.remote.transport import Refused
from isthmus.engines.shared_folder import Follower, Publisher, read_entries
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.delta import apply, describe, is_delta
from isthmus.formats.wire import set_sha256, unpack
from isthmus.progress import Watch

PROMPTS = [[0, 2, 60, 61, 4], [0, 2, 70, 4]]


def version_of(number: int) -> dict[str, torch.Tensor]:
    """Tensors that change a little from version to version."""
    generator = torch.Generator().manual_seed(number)
    base = torch.arange(600, dtype=torch.float32).view(20, 30)
    return {
        "w": (base % 200 - 100 + torch.randint(0, 2, (20, 30), generator=generator)).to(torch.int8),
        "s": torch.rand(20, 1, generator=generator),
        "n": torch.ones(7),
    }


class Receiver:
    """An engine's side of updates, with a network that loses some of what is sent."""

    takes_deltas = True

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self.version, self.kinds, self.refuse, self.forget = -1, [], False, False

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        if self.refuse:
            raise EngineError("it is gone")
        if is_delta(payload):
            if self.forget or describe(payload).base_version != self.version:
                self.forget = False
                raise Refused(f"version {self.version} is in use", 409)
            self.tensors, _ = apply(payload, self.tensors)
        else:
            self.tensors = unpack(payload, sha256)
        self.version = version
        self.kinds.append("delta" if is_delta(payload) else "full")


def same(found: dict[str, torch.Tensor], number: int) -> bool:
    wanted = version_of(number)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_deltas_with_a_snapshot_every_so_often():
    receiver = Receiver()
    channel = Channel(receiver, snapshot_every=3)  # type: ignore[arg-type]
    for number in range(9):
        sent = channel.send(version_of(number), number)
        assert same(receiver.tensors, number) and sent.sha256 == set_sha256(version_of(number))
        assert sent.full_bytes == 600 + 80 + 28 and (sent.kind == "full" or sent.bytes < 900)
    assert receiver.kinds == ["full", *["delta"] * 3, "full", *["delta"] * 3, "full"]


def test_a_receiver_that_lost_its_version_gets_all_tensors_and_it_is_said():
    receiver = Receiver()
    channel = Channel(receiver)  # type: ignore[arg-type]
    assert [channel.send(version_of(number), number).fallback for number in range(2)] == [None, None]
    receiver.forget = True
    sent = channel.send(version_of(2), 2)
    assert sent.kind == "full" and "in use" in (sent.fallback or "") and same(receiver.tensors, 2)
    receiver.refuse = True
    with pytest.raises(EngineError, match="gone"):
        channel.send(version_of(3), 3)
    receiver.refuse = False
    assert channel.send(version_of(4), 4).kind == "delta" and same(receiver.tensors, 4)


@pytest.mark.parametrize("deltas", [True, False])
def test_an_engine_that_takes_no_deltas_gets_none(deltas):
    receiver = Receiver()
    receiver.takes_deltas = not deltas
    channel = Channel(receiver, deltas=deltas)  # type: ignore[arg-type]
    for number in range(3):
        channel.send(version_of(number), number)
    assert receiver.kinds == ["full"] * 3


@pytest.mark.parametrize("seed", range(8))
def test_a_follower_reaches_the_newest_version_whatever_is_lost(tmp_path, seed):
    chance = random.Random(seed)
    publisher, follower = Publisher(tmp_path / "v", snapshot_every=5), Follower(tmp_path / "v")
    for number in range(40):
        publisher.publish(version_of(number), number)
        newest = read_entries(tmp_path / "v")[-1]
        if newest.kind == "delta" and chance.random() < 0.15:
            path = tmp_path / "v" / newest.file
            path.unlink() if chance.random() < 0.5 else path.write_bytes(path.read_bytes()[:-3] + b"xyz")
        if chance.random() < 0.6:
            while follower.advance():
                assert follower.version is not None and same(follower.tensors, follower.version)
    publisher.snapshot_every = 0
    publisher.publish(version_of(40), 40)
    while follower.advance():
        pass
    assert follower.version == 40 and same(follower.tensors, 40) and follower.behind == 0


def test_old_files_go_and_what_a_follower_needs_stays(tmp_path):
    publisher = Publisher(tmp_path, snapshot_every=4)
    for number in range(23):
        publisher.publish(version_of(number), number)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{n:06d}.{'full' if n % 5 == 0 else 'delta'}" for n in range(15, 23)] + ["latest.json"]
    late = Follower(tmp_path)
    while late.advance():
        pass
    assert late.version == 22 and same(late.tensors, 22)


def test_a_publisher_that_starts_again_goes_on_with_a_snapshot(tmp_path):
    Publisher(tmp_path).publish(version_of(0), 0)
    again = Publisher(tmp_path)
    assert again.publish(version_of(1), 1).kind == "full" and again.publish(version_of(2), 2).kind == "delta"


def test_what_is_no_folder_of_versions_is_named(tmp_path):
    assert not Follower(tmp_path).advance()
    (tmp_path / "latest.json").write_text("[1]")
    with pytest.raises(IsthmusError, match="no list of versions"):
        Follower(tmp_path).advance()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("followed") / "w8a8"
    write_small_bundle(folder, "w8a8")
    with LocalEngine(folder, log=folder.parent / "engine.log", slots=8) as engine:
        yield engine


def exported(seed: int) -> dict[str, torch.Tensor]:
    model = thinking_model(small_tokenizer(), seed)
    return get_format("w8a8").export(model.state_dict(), model.architecture)


def test_the_local_engine_takes_deltas_and_refuses_those_on_another_base(engine):
    channel, sampling = Channel(engine), Sampling(8, temperature=0.0)
    kinds = [channel.send(exported(seed), 10 + seed).kind for seed in range(3)]
    assert kinds == ["full", "delta", "delta"]
    by_delta = engine.generate(PROMPTS, sampling)
    other = Channel(engine, deltas=False)
    other.send(exported(2), 30)
    again = engine.generate(PROMPTS, sampling)
    assert [one[0].tokens for one in by_delta] == [one[0].tokens for one in again]
    assert by_delta[0][0].version == 12
    sent = channel.send(exported(3), 13)
    assert sent.kind == "full" and "version 30 is in use" in (sent.fallback or "")
    assert channel.send(exported(4), 14).kind == "delta" and engine.version == 14


def test_a_run_and_an_engine_that_cannot_reach_each_other(engine, tmp_path):
    publisher = Publisher(tmp_path / "shared")
    with pytest.raises(IsthmusError, match="no version that can be taken"):
        follow_once(tmp_path / "shared", engine)
    for seed in (5, 6, 7):
        publisher.publish(exported(seed), 100 + seed)
    follow_once(tmp_path / "shared", engine)
    assert engine.generate(PROMPTS[:1], Sampling(2))[0][0].version == 107
    shutil.rmtree(tmp_path / "shared")


def follow_once(folder: Path, engine: LocalEngine) -> None:
    options = {"url": engine.url, "api_key": engine.api_key, "bundle": engine.bundle_folder, "exchange": None}
    follow.execute(folder, Watch(quiet=True), **options, once=True)


def test_a_damaged_delta_leaves_the_engine_as_it_is(engine):
    channel = Channel(engine)
    channel.send(exported(0), 200)
    payload = bytearray(b"ISTHMUS delta 1\n" + b"\0" * 60)
    with pytest.raises((EngineError, DamagedFile)):
        engine.update(bytes(payload), 201, __import__("hashlib").sha256(payload).hexdigest())
    assert channel.send(exported(1), 202).kind == "delta"
