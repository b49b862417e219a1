"""Versions on their way: what a publisher keeps, and a folder from which followers take what they can."""

from __future__ import annotations

import pytest
import torch

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.publisher import Publisher
from isthmus.formats.updates.version_folder import (
    LATEST,
    Lost,
    VersionWriter,
    advance,
    next_versions,
    read_delta,
    read_snapshot,
    read_versions,
)


def tensors_at(version, seed=0):
    """Weights that a few elements of change at each version."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        "a": torch.randint(-100, 100, (40, 20), generator=generator, dtype=torch.int8),
        "b": torch.randn(30, generator=generator),
    }
    for _ in range(version):
        found["a"] += (torch.rand(40, 20, generator=generator) < 0.05).to(torch.int8)
        found["b"] += 1e-3 * torch.randn(30, generator=generator)
    return found


def publish(publisher, version, seed=0):
    return publisher.publish(version, tensors_at(version, seed))


def test_a_publisher_keeps_its_own_copy():
    publisher, live = Publisher(snapshot_every=100), tensors_at(0)
    first = publisher.publish(0, live)
    live["b"] += 1
    second = publisher.publish(1, live)
    assert first.weights.sha256 == WeightSet.of(0, tensors_at(0)).sha256 != second.weights.sha256
    assert second.delta and sum(map(len, second.delta)) > 100


def write(folder, versions, publisher=None, **options):
    publisher = publisher or Publisher(snapshot_every=4)
    writer = VersionWriter(folder, "w8a8", **options)
    return [writer.write(publish(publisher, version)) for version in versions]


def follow(folder, weights=None):
    """(weights, how many deltas and snapshots led there)."""
    versions, used = read_versions(folder), [0, 0]
    while next_versions(versions, weights) != []:
        weights, parts = advance(folder, weights, versions)
        used[0 if parts else 1] += 1
    return weights, tuple(used)


def test_a_folder_holds_what_any_follower_since_its_older_snapshot_needs(tmp_path):
    write(tmp_path, range(11))
    stored = read_versions(tmp_path)
    assert [one.version for one in stored] == [4, 5, 6, 7, 8, 9, 10]
    assert [one.version for one in stored if one.snapshot] == [4, 8]
    names = {kind: sorted(path.name[:6] for path in (tmp_path / kind).iterdir()) for kind in ("versions", "snapshots")}
    assert names == {"versions": [f"{version:06d}" for version in range(4, 11)], "snapshots": ["000004", "000008"]}
    for version in range(4, 11):
        held = WeightSet.of(version, tensors_at(version))
        found, used = follow(tmp_path, held)
        assert found.sha256 == stored[-1].sha256 and used == (10 - version, 0)
    for held in (None, WeightSet.of(2, tensors_at(2))):
        found, used = follow(tmp_path, held)
        assert found.sha256 == stored[-1].sha256 and used == (2, 1)


def test_a_lost_file_is_waited_for_until_the_next_snapshot(tmp_path):
    publisher = Publisher(snapshot_every=4)
    write(tmp_path, range(7), publisher)
    (tmp_path / "versions" / "000006.delta").write_bytes(b"damaged")
    held = WeightSet.of(5, tensors_at(5))
    with pytest.raises(Lost, match=r"000006\.delta does not match"):
        follow(tmp_path, held)
    write(tmp_path, [7, 8], publisher)
    found, used = follow(tmp_path, held)
    assert (found.version, used) == (8, (0, 1))
    assert found.sha256 == WeightSet.of(8, tensors_at(8)).sha256


def test_a_lost_snapshot_leaves_the_older_one(tmp_path):
    write(tmp_path, range(7))
    (tmp_path / "snapshots" / "000004.safetensors").unlink()
    found, used = follow(tmp_path)
    assert (found.version, used) == (6, (6, 1))


def test_a_trainer_that_goes_back_starts_with_a_snapshot(tmp_path):
    write(tmp_path, range(7))
    ahead = WeightSet.of(6, tensors_at(6, seed=9))
    again = write(tmp_path, [4, 5])
    assert again[0].snapshot is not None and again[0].delta is None
    found, _ = follow(tmp_path, ahead)
    assert (found.version, found.sha256) == (5, WeightSet.of(5, tensors_at(5)).sha256)
    assert read_snapshot(tmp_path, again[0]).version == 4 and len(read_delta(tmp_path, again[1])) == 1


def test_a_folder_says_what_is_wrong_with_it(tmp_path):
    with pytest.raises(IsthmusError, match="nothing has been published"):
        read_versions(tmp_path)
    write(tmp_path, [0])
    with pytest.raises(IsthmusError, match="holds versions in format w8a8, not bf16"):
        VersionWriter(tmp_path, "bf16").write(publish(Publisher(snapshot_every=1), 1))
    text = (tmp_path / LATEST).read_text()
    (tmp_path / LATEST).write_text(text.replace("snapshots/000000", "../../etc/000000"))
    with pytest.raises(DamagedFile, match="leads out of the folder"):
        read_versions(tmp_path)
