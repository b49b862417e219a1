"""The engine's side of an exchange of weights inside vLLM, on a model that fuses, cuts, pads and packs as vLLM's do."""

from __future__ import annotations

import ast
import http.server
import json
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard

from isthmus.engines.channel import writer
from isthmus.engines.vllm_plugin import checksums, layout
from isthmus.engines.vllm_plugin.checksums import Piece, combined, tensor_sum
from isthmus.engines.vllm_plugin.layout import Unusable
from isthmus.engines.vllm_plugin.transplant import Misfit, Transplant
from isthmus.errors import IsthmusError
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.publisher import Publisher
from isthmus.formats.updates.shared_layout import INDEX, write_version
from isthmus.model.digest import tensor_sha256
from tests.support.toy_engine import checkpoint, computed, seen, standing

PLUGIN = Path(checksums.__file__).parent


def version(number, seed):
    return WeightSet.of(number, checkpoint(seed))


def bring(engine, source):
    engine.stage(str(source))
    engine.staged.thread.join()
    engine.switch()


def serves(engine, seed):
    wanted = computed(checkpoint(seed), seen())
    return float((engine.live(seen()) - wanted).abs().max() / wanted.abs().max()) < 1e-5


def pieces_of(engines, name):
    reports = [one.report()["tensors"].get(name, []) for one in engines]
    return [Piece.read(one) for report in reports for one in report]


@pytest.fixture
def engine(tmp_path):
    """One that took version 1 and serves it."""
    engine = standing()
    bring(engine, write_version(tmp_path, None, version(1, 1), compression="zlib"))
    return engine


def test_a_version_serves_after_the_switch_and_not_before(tmp_path):
    engine = standing()
    assert serves(engine, 0)
    engine.stage(str(write_version(tmp_path, None, version(1, 1))))
    engine.staged.thread.join()
    assert engine.state() == {"version": None, "staged": 1, "state": "ready", "error": None} and serves(engine, 0)
    engine.switch()
    assert serves(engine, 1) and engine.state()["version"] == 1
    bring(engine, write_version(tmp_path, version(1, 1), version(2, 2), compression="zlib"))
    assert serves(engine, 2)


def test_checksums_are_those_of_the_checkpoint_however_ranks_and_layers_keep_it(tmp_path):
    source = write_version(tmp_path, None, version(1, 1))
    for ranks in (1, 2, 4):
        engines = [standing(rank, ranks) for rank in range(ranks)]
        for one in engines:
            bring(one, source)
        for name, tensor in checkpoint(1).items():
            found = combined(pieces_of(engines, name), tensor.numel())
            assert found == (None if name == "mtp.weight" else ("bfloat16", tensor_sum(tensor))), (ranks, name)
        assert engines[0].report()["unread"] == ["mtp.weight"]


def test_a_checksum_tells_every_change_of_order_or_value():
    tensor = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    others = [tensor.T.contiguous(), tensor.flip(0), tensor.clone(), -tensor]
    others[2][3, 5] = 22.875
    assert len({tensor_sum(one) for one in [tensor, *others]}) == 5
    assert tensor_sum(torch.zeros(5)) != tensor_sum(-torch.zeros(5))


def test_ranks_that_disagree_or_leave_a_gap_give_no_checksum():
    flat = torch.arange(10.0)
    place = checksums.Place.of(flat[:6])
    piece = checksums.piece_of(flat[:6], place)
    assert combined([piece], 10) is None
    rest = checksums.piece_of(flat[6:], checksums.Place.of(flat[6:]))
    assert combined([piece, piece, rest], 10) == ("float32", tensor_sum(flat))
    assert combined([piece, rest, checksums.piece_of(flat[:6] + 1, place)], 10) is None


def broken(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    return folder


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 16]) + content[-8:]


def other_hash(content):
    hashes = json.loads(content)
    return json.dumps(hashes | {"norm.weight": "0" * 64}).encode()


def without_one(content):
    hashes = json.loads(content)
    return json.dumps({name: one for name, one in hashes.items() if name != "norm.weight"}).encode()


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("model-00000-of-00001.safetensors", flipped, "SHA-256|cannot be read"),
        ("model-00000-of-00001.safetensors", lambda content: content[:-40], "cannot be read"),
        ("sha256.json", other_hash, "norm.weight has another SHA-256"),
        ("sha256.json", without_one, "norm.weight is not announced"),
        (INDEX, lambda content: content.replace(b'"model-0', b'"../model-0'), "no file of its folder"),
        (INDEX, lambda content: content[:20], "cannot be read"),
        (INDEX, lambda content: content.replace(b"xor", b"sub"), "unknown encoding"),
        (INDEX, lambda content: content.replace(b'"base_version": "000001"', b'"base_version": "000007"'), "version 7"),
    ],
)
def test_a_version_that_is_damaged_changes_nothing(engine, tmp_path, name, change, why):
    good = write_version(tmp_path, version(1, 1), version(2, 2), compression="zlib")
    before = engine.live(seen())
    kept = (good / name).read_bytes()
    broken(good, name, change)
    with pytest.raises(Unusable, match=why):
        bring(engine, good)
    assert torch.equal(engine.live(seen()), before) and engine.state()["version"] == 1
    (good / name).write_bytes(kept)
    bring(engine, good)
    assert serves(engine, 2)


def shifted(name, tensor):
    """As a loader that works on a copy, and does it wrongly."""
    tensor = tensor.clone()
    if name == "layer.experts.2.up_proj.weight":
        tensor += 1
    return tensor


def test_a_loader_that_makes_something_else_of_a_tensor_is_named(engine, tmp_path):
    engine.make.meddle = shifted
    source = write_version(tmp_path, version(1, 1), version(2, 2))
    with pytest.raises(Misfit, match=r"layer\.experts\.2\.up_proj\.weight came out"):
        bring(engine, source)
    assert serves(engine, 1)
    engine.make.meddle = lambda name, tensor: None if name == "norm.weight" else tensor
    with pytest.raises(Misfit, match="nothing for norm"):
        bring(engine, source)
    assert serves(engine, 1) and engine.report()["altered"] == []


def test_a_switch_that_does_only_half_of_its_work_is_taken_back(engine, tmp_path, monkeypatch):
    whole = Transplant.exchange

    def half(self):
        pairs, self.pairs = self.pairs, self.pairs[::2]
        whole(self)
        self.pairs = pairs
        self.exchange = lambda: (setattr(self, "pairs", pairs[::2]), whole(self), setattr(self, "pairs", pairs))

    monkeypatch.setattr(Transplant, "exchange", half)
    with pytest.raises(Misfit, match="did not take what was brought"):
        bring(engine, write_version(tmp_path, version(1, 1), version(2, 2)))
    assert serves(engine, 1) and engine.report()["altered"] == []


def test_what_a_loader_computes_is_not_told_as_what_the_checkpoint_has(engine, tmp_path):
    engine.make.meddle = lambda name, tensor: -tensor if name == "norm.weight" else tensor
    bring(engine, write_version(tmp_path, version(1, 1), version(2, 2)))
    report = engine.report()
    assert report["unread"] == ["mtp.weight", "norm.weight"] and "norm.weight" not in report["tensors"]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda live: live.norm.data.fill_(1), {"norm.weight"}),
        (lambda live: live.layer.weight.data[9].fill_(1), {"layer.k_proj.weight"}),
        (lambda live: live.experts.w13.data[1].copy_(live.experts.w13.data[1].flip(0)), None),
        (lambda live: live.experts.method.kernel.packed.zero_(), None),
    ],
)
def test_what_changes_after_the_switch_is_named(engine, spoil, named):
    assert engine.report()["altered"] == []
    spoil(engine.live)
    altered = set(engine.report()["altered"])
    if named is None:
        assert "layer.experts.1.gate_proj.weight" in altered and "norm.weight" not in altered
    else:
        assert altered == named


def test_recorded_graphs_keep_their_addresses_or_the_version_is_refused(tmp_path):
    engine = standing(graphs=True)
    with pytest.raises(Misfit, match="--enforce-eager"):
        bring(engine, write_version(tmp_path, None, version(1, 1)))
    assert serves(engine, 0)


def test_what_only_changes_its_content_keeps_its_address(engine, tmp_path):
    address = engine.live.norm.data_ptr()
    bring(engine, write_version(tmp_path, version(1, 1), version(2, 2)))
    assert engine.live.norm.data_ptr() == address and engine.live.norm_too is engine.live.norm


@contextmanager
def served(folder, cut=0):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def copyfile(self, source, out):
            content = source.read()
            out.write(content[: len(content) - cut])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def test_versions_are_pulled_over_http_and_a_body_cut_short_is_refused(engine, tmp_path):
    source = write_version(tmp_path, version(1, 1), version(2, 2), compression="zlib")
    with served(tmp_path, cut=5) as url, pytest.raises(Unusable, match=r"cannot be fetched|ended after"):
        bring(engine, f"{url}/{source.name}")
    with served(tmp_path) as url:
        with pytest.raises(Unusable, match="cannot be fetched"):
            bring(engine, f"{url}/weight_v000009")
        assert serves(engine, 1)
        bring(engine, f"{url}/{source.name}")
    assert serves(engine, 2)


def read_as_others_do(folder, base):
    """As the documentation of miles describes what SGLang does: bytes, by the index alone."""
    index = json.loads((folder / INDEX).read_text())
    facts, result = index["metadata"], {name: tensor.clone() for name, tensor in base.items()}
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(folder / file, "np") as opened:
            delta = np.frombuffer(zstandard.ZstdDecompressor().decompress(opened.get_tensor(name).tobytes()), np.uint8)
            announced = opened.metadata()[name]
        target = result[name].view(torch.uint8).reshape(-1).numpy()
        if facts["delta_encoding"] == "xor":
            target ^= delta
        else:
            count = int(delta[:4].view("<u4")[0])
            target[delta[4 : 4 + 4 * count].view("<u4")] = delta[4 + 4 * count :]
        assert facts["checksum_format"] == "adler32" and announced == f"{zlib.adler32(target.tobytes()):08x}"
    return facts, result


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_other_readers_of_the_shared_layout_find_the_same_tensors(tmp_path, encoding):
    base = version(7, 1)
    tensors = checkpoint(1) | {"norm.weight": checkpoint(2)["norm.weight"]}
    tensors["layer.q_proj.weight"] = checkpoint(1)["layer.q_proj.weight"].clone()
    tensors["layer.q_proj.weight"][3, 3] += 1
    folder = write_version(tmp_path, base, WeightSet.of(8, tensors), encoding=encoding)
    assert folder.name == "weight_v000008"
    facts, found = read_as_others_do(folder, base.tensors)
    assert (facts["version"], facts["base_version"]) == ("000008", "000007")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    number, ours = layout.read_version(str(folder), 7, base.tensors)
    assert number == 8 and all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
    assert len(safetensors.torch.load_file(folder / "model-00000-of-00001.safetensors")) == 2


def test_a_version_of_another_trainer_is_held_against_its_own_checksums(tmp_path):
    base = version(7, 1)
    folder = write_version(tmp_path, base, version(8, 2))
    index = json.loads((folder / INDEX).read_text())
    del index["metadata"]["isthmus"]
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "sha256.json").unlink()
    assert torch.equal(
        layout.read_version(str(folder), 7, base.tensors)[1]["norm.weight"], checkpoint(2)["norm.weight"]
    )
    with pytest.raises(Unusable, match="another checksum"):
        layout.read_version(str(folder), 7, checkpoint(3))
    index["metadata"]["checksum_format"] = "crc"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(Unusable, match="unknown checksums 'crc'"):
        layout.read_version(str(folder), 7, base.tensors)


def test_a_step_can_publish_in_the_shared_layout_and_who_follows_has_every_version(tmp_path):
    publisher, sent = Publisher(snapshot_every=3), writer(tmp_path, "bf16", "shared")
    held, number = {}, None
    for place in range(5):
        tensors = checkpoint(1) | {"norm.weight": checkpoint(place)["norm.weight"]}
        folder = sent.write(publisher.publish(place + 10, tensors))
        facts = json.loads((folder / INDEX).read_text())["metadata"]
        assert (facts["base_version"] is None) == (place in (0, 3))
        number, held = layout.read_version(str(folder), number, held)
        assert number == place + 10 and all(torch.equal(held[name], one) for name, one in tensors.items())
    assert len(list(tmp_path.iterdir())) == 5


def test_tensors_of_another_kind_are_not_written_as_a_delta(tmp_path):
    other = checkpoint(2) | {"norm.weight": checkpoint(2)["norm.weight"].float()}
    with pytest.raises(IsthmusError, match="write it whole"):
        write_version(tmp_path, version(1, 1), WeightSet.of(2, other))
    assert not list(tmp_path.iterdir())


def test_many_files_of_a_version_are_one_version(engine, tmp_path):
    source = write_version(tmp_path, None, version(2, 2), shard_bytes=300)
    assert len(list(source.glob("*.safetensors"))) > 3
    bring(engine, source)
    assert serves(engine, 2)


def test_a_new_stage_takes_the_place_of_the_old_one_and_nothing_staged_is_no_switch(engine, tmp_path):
    engine.stage("/nowhere")
    engine.stage(str(write_version(tmp_path, version(1, 1), version(2, 2))))
    end = time.monotonic() + 30
    while engine.state()["state"] == "pulling" and time.monotonic() < end:
        time.sleep(0.01)
    engine.switch()
    assert serves(engine, 2)
    with pytest.raises(Unusable, match="no version was staged"):
        engine.switch()


def test_hashes_are_those_of_the_trainer():
    for tensor in (torch.randn(3, 4).to(torch.bfloat16).T, torch.zeros(0, 2), torch.tensor(3, dtype=torch.int8)):
        assert layout.tensor_sha256(tensor) == tensor_sha256(tensor)


def test_the_wheel_needs_torch_safetensors_and_the_standard_library_alone():
    """vLLM beside them, into which it goes; what it can do without is imported by name where it is there."""
    allowed = {"torch", "safetensors", "vllm", *sys.stdlib_module_names}
    for path in PLUGIN.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module.partition(".")[0] in allowed), path
