"""Updates of the weights in parts: nothing is seen before the end, and what fails changes nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import threading
import zlib

import pytest
import torch

from isthmus.engines.local.api.protocol import ApiError
from isthmus.engines.local.api.service import load_service
from isthmus.engines.local.api.weights import WeightUpdates
from isthmus.engines.local.core.scheduler import Finished, Request
from isthmus.errors import DamagedFile
from isthmus.formats import get_format
from isthmus.formats.updates.delta import WeightSet, apply, encode
from isthmus.formats.updates.wire import digest, pack, unpack
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle

PROMPT = [0, 2, 60, 61, 4]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "w8a8"
    write_small_bundle(folder, "w8a8")
    return folder


@pytest.fixture
def service(bundle):
    found = load_service(bundle, slots=4)
    yield found
    found.core.stop()


@pytest.fixture(scope="module")
def service_of_module(bundle):
    found = load_service(bundle, slots=4)
    yield found
    found.core.stop()


@pytest.fixture
def updates(service):
    return WeightUpdates(service)


def tensors_of(seed):
    model = thinking_model(small_tokenizer(), seed)
    return get_format("w8a8").export(model.state_dict(), model.architecture)


def messages(tensors, size=7):
    """The tensors in parts, each with its hash."""
    names = sorted(tensors)
    for start in range(0, len(names), size):
        payload = pack({name: tensors[name] for name in names[start : start + size]})
        yield payload, digest(payload)


def send(updates, tensors):
    for payload, sha256 in messages(tensors):
        updates.add(payload, sha256)


def answer(service, tokens=10):
    """(tokens, versions) of a greedy completion by the running engine."""
    found: list[Finished] = []
    done = threading.Event()

    def listen(event):
        found.append(event)
        done.set()

    service.core.submit(Request([PROMPT], listen, tokens, temperature=0.0))
    assert done.wait(60)
    return found[0].tokens, (found[0].version, found[0].last_version)


def expected(service, tensors, tokens=10):
    """The same by the format's model without an engine."""
    model = get_format("w8a8").build(service.architecture, tensors)
    written: list[int] = []
    with torch.no_grad():
        while len(written) < tokens and written[-1:] != [service.tokenizer.eos_id]:
            written.append(int(model(torch.tensor([[*PROMPT, *written]]))[0, -1].argmax()))
    return written


def refuse(status, code, call, *args, **options):
    with pytest.raises(ApiError) as refused:
        call(*args, **options)
    assert (refused.value.status, refused.value.code) == (status, code), str(refused.value)


def test_a_full_update_is_seen_at_its_end_and_not_before(service, updates):
    new = tensors_of(1)
    before = answer(service)
    updates.start(7)
    for payload, sha256 in messages(new):
        assert updates.info()["update"]["missing"] > 0
        updates.add(payload, sha256)
        assert answer(service) == before
    assert updates.info()["update"]["missing"] == 0 and updates.info()["version"] == 0
    taken = updates.finish(7, WeightSet.of(0, new).sha256)
    assert taken == {"version": 7, "sha256": WeightSet.of(0, new).sha256}
    assert answer(service) == (expected(service, new), (7, 7))
    info = updates.info()
    assert (info["version"], info["update"], info["sealed"]) == (7, None, False)
    assert info["last_update"] == {"version": 7, "outcome": "finished", "reason": None}


def test_a_delta_keeps_what_it_does_not_name(service, updates):
    old, new = dict(service.tensors), tensors_of(1)
    changed = {name: tensor for name, tensor in new.items() if "layers.1." in name or name == "lm_head.weight"}
    assert 0 < len(changed) < len(old)
    updates.start(3, "delta", base_version=0)
    send(updates, changed)
    whole = old | changed
    updates.finish(3, WeightSet.of(0, whole).sha256)
    assert answer(service) == (expected(service, whole), (3, 3))
    updates.start(4, "delta", base_version=3)
    send(updates, {name: tensor for name, tensor in new.items() if name not in changed})
    updates.finish(4)
    assert answer(service) == (expected(service, new), (4, 4)), "two deltas are the whole"


def test_the_hash_of_a_set_does_not_depend_on_how_it_was_sent(service):
    tensors = dict(service.tensors)
    split = [unpack(payload, sha256) for payload, sha256 in messages(tensors, size=3)]
    merged = dict(itertools.chain.from_iterable(part.items() for part in reversed(split)))
    assert WeightSet.of(0, merged).sha256 == WeightSet.of(0, tensors).sha256
    name = next(iter(tensors))
    assert WeightSet.of(0, {**tensors, name: tensors[name] + 1}).sha256 != WeightSet.of(0, tensors).sha256
    assert WeightSet.of(0, {f"{n}x": t for n, t in tensors.items()}).sha256 != WeightSet.of(0, tensors).sha256


def test_wrong_orders_are_refused_with_what_to_do(service, updates):
    payload, sha256 = next(messages(tensors_of(1)))
    refuse(409, "no_update", updates.add, payload, sha256)
    refuse(409, "no_update", updates.finish, 5)
    refuse(409, "version_in_use", updates.start, 0)
    refuse(409, "wrong_base", updates.start, 5, "delta", base_version=4)
    refuse(400, None, updates.start, 5, "delta")
    refuse(400, None, updates.start, 5, format_name="bf16")
    updates.start(5)
    refuse(409, "update_open", updates.start, 6)
    refuse(409, "update_open", updates.at_once, payload, 6, sha256)
    refuse(409, "wrong_version", updates.finish, 6)
    refuse(409, "incomplete", updates.finish, 5)
    updates.add(payload, sha256)
    refuse(409, "incomplete", updates.finish, 5)
    updates.start(6, abort=True)
    assert updates.info()["update"]["chunks"] == [], "the aborted update left nothing behind"
    assert updates.abort()["last_update"]["outcome"] == "abandoned"
    assert service.core.version == 0


def test_damaged_and_unfit_messages_are_refused_and_better_ones_taken(service, updates):
    new = tensors_of(1)
    before = answer(service)
    updates.start(2)
    payload, sha256 = next(messages(new))
    flipped = bytearray(payload)
    flipped[-1] ^= 1
    with pytest.raises(DamagedFile, match="SHA-256"):
        updates.add(bytes(flipped), sha256)
    with pytest.raises(DamagedFile, match="safetensors"):
        updates.add(b"nothing", digest(b"nothing"))
    scale = next(name for name in new if name.endswith("weight_scale"))
    for wrong, reason in (
        ({"unheard.of": torch.zeros(2)}, "unheard.of is unknown"),
        ({"lm_head.weight": new["lm_head.weight"][:-1]}, "lm_head.weight is"),
        ({"lm_head.weight": new["lm_head.weight"].float()}, "float32"),
        ({scale: torch.full_like(new[scale], float("nan"))}, "not a number"),
        ({scale: torch.full_like(new[scale], float("inf"))}, "infinite"),
    ):
        message = pack({name: tensor.contiguous() for name, tensor in wrong.items()})
        with pytest.raises(DamagedFile, match=reason):
            updates.add(message, digest(message))
    assert updates.info()["update"]["tensors"] == 0 and answer(service) == before
    send(updates, new)
    updates.finish(2)
    assert answer(service)[0] == expected(service, new)


def test_one_message_is_checked_like_many(service, updates):
    new, before = tensors_of(1), answer(service)
    scale = next(name for name in new if name.endswith("weight_scale"))
    for wrong, reason in (
        ({**new, scale: torch.full_like(new[scale], float("nan"))}, "not a number"),
        ({name: tensor for name, tensor in new.items() if name != scale}, "is missing"),
    ):
        payload = pack(wrong)
        with pytest.raises(DamagedFile, match=reason):
            updates.at_once(payload, 2, digest(payload))
        assert updates.info()["last_update"]["outcome"] == "refused" and answer(service) == before
    payload = pack(new)
    assert updates.at_once(payload, 2, digest(payload)) == {"version": 2, "sha256": digest(payload)}
    assert answer(service) == (expected(service, new), (2, 2))


def test_lost_messages_can_be_sent_again(service, updates):
    new = tensors_of(1)
    updates.start(2)
    parts = list(messages(new))
    for payload, sha256 in parts[::2]:
        updates.add(payload, sha256)
    known = updates.info()["update"]["chunks"]
    for payload, sha256 in parts:
        first = updates.add(payload, sha256)
        assert updates.add(payload, sha256) == first, "a message that comes twice changes nothing"
    assert set(known) < {sha256 for _, sha256 in parts}
    taken = updates.finish(2, WeightSet.of(0, new).sha256)
    revision = service.revision
    assert updates.finish(2, WeightSet.of(0, new).sha256) == taken, "so does a finish whose answer was lost"
    assert service.revision == revision
    refuse(409, "no_update", updates.finish, 2, "0" * 64)


def test_the_same_tensor_with_other_values_is_a_conflict(service, updates):
    updates.start(2)
    send(updates, tensors_of(1))
    payload, sha256 = next(messages(tensors_of(2)))
    refuse(409, "tensor_conflict", updates.add, payload, sha256)
    updates.finish(2)
    assert answer(service)[0] == expected(service, tensors_of(1))


def test_weights_that_are_not_the_announced_ones_are_not_taken(service, updates):
    before = answer(service)
    updates.start(2)
    send(updates, tensors_of(1))
    with pytest.raises(DamagedFile, match="given up"):
        updates.finish(2, WeightSet.of(0, tensors_of(2)).sha256)
    assert answer(service) == before and updates.info()["update"] is None
    assert updates.info()["last_update"]["outcome"] == "abandoned"


def test_a_model_that_cannot_be_built_leaves_the_old_one(service, updates, monkeypatch):
    before, tensors = answer(service), service.tensors
    updates.start(2)
    send(updates, tensors_of(1))

    def fail(*_):
        raise DamagedFile("no memory for it")

    monkeypatch.setattr(type(get_format("w8a8")), "build", fail)
    with pytest.raises(DamagedFile, match="no memory"):
        updates.finish(2)
    assert answer(service) == before and service.tensors is tensors and service.is_original
    assert updates.info()["last_update"] == {"version": 2, "outcome": "refused", "reason": "no memory for it"}


def test_a_sender_that_falls_silent_is_given_up(service):
    clock = Clock()
    updates = WeightUpdates(service, idle_s=60, clock=clock)
    updates.start(2)
    parts = list(messages(tensors_of(1)))
    for payload, sha256 in parts[:3]:
        clock.now += 50
        updates.add(payload, sha256)
    clock.now += 61
    updates.expire()
    assert updates.info()["update"] is None and "silent" in updates.info()["last_update"]["reason"]
    refuse(409, "no_update", updates.add, *parts[3])
    updates.start(2)
    updates.abort()


def test_an_update_whose_base_was_exchanged_under_it_is_not_mixed(service, updates):
    updates.start(2, "delta", base_version=0)
    payload, sha256 = next(messages(tensors_of(1)))
    updates.add(payload, sha256)
    service.exchange(tensors_of(2), 0, "another hand")
    refuse(409, "wrong_base", updates.finish, 2)
    assert answer(service)[0] == expected(service, tensors_of(2))


def elements(new, base, version=2, base_version=0, **options):
    """What changed between two sets of tensors, each part with its hash."""
    parts = encode(WeightSet.of(base_version, base), WeightSet.of(version, new), **options)
    return [(part, digest(part)) for part in parts]


def test_a_delta_of_elements_gives_the_whole_and_can_be_sent_again(service, updates):
    base, new = dict(service.tensors), tensors_of(1)
    updates.start(2, "delta", base_version=0)
    parts = elements(new, base, part_bytes=4000)
    assert len(parts) > 3
    for payload, sha256 in [*parts, *parts[:2]]:
        before = answer(service)
        updates.add(payload, sha256)
        assert answer(service) == before
    assert updates.finish(2, WeightSet.of(0, new).sha256) == {"version": 2, "sha256": WeightSet.of(0, new).sha256}
    assert answer(service) == (expected(service, new), (2, 2))
    back = elements(base, new, 3, 2)
    updates.start(3, "delta", base_version=2)
    updates.add(*back[0])
    updates.finish(3, WeightSet.of(0, base).sha256)
    assert answer(service) == (expected(service, base), (3, 3))


def test_a_delta_of_elements_is_taken_only_where_it_fits(service, updates):
    base, new = dict(service.tensors), tensors_of(1)
    before = answer(service)
    [(payload, sha256)] = elements(new, base)
    updates.start(2)
    refuse(400, None, updates.add, payload, sha256)
    updates.start(3, "delta", base_version=0, abort=True)
    refuse(409, "wrong_version", updates.add, payload, sha256)
    updates.start(2, "delta", base_version=0, abort=True)
    for wrong in elements(new, tensors_of(2)):
        refuse(409, "wrong_base", updates.add, *wrong)
    with pytest.raises(DamagedFile, match="send it again"):
        updates.add(payload[:-1] + bytes([payload[-1] ^ 1]), sha256)
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in new.items() if name.endswith("scale")}
    with pytest.raises(DamagedFile, match="not a number"):
        updates.add(*elements({**new, **broken}, base)[0])
    assert answer(service) == before
    updates.add(payload, sha256)
    with pytest.raises(DamagedFile, match="was announced"):
        updates.finish(2, "0" * 64)
    assert answer(service) == before and updates.info()["last_update"]["outcome"] == "abandoned"


def in_parts(service, seed):
    """A delta of elements to other weights in several parts, and the whole of these."""
    base, new = WeightSet.of(0, dict(service.tensors)), WeightSet.of(1, tensors_of(seed))
    parts = encode(base, new, part_bytes=2000)
    assert len(parts) > 2
    return parts, new


def test_half_of_what_the_header_announces_is_not_taken_whoever_forgets_the_hash(service, updates):
    parts, new = in_parts(service, 1)
    before = answer(service)
    updates.start(1, "delta", base_version=0)
    for payload in parts[:-1]:
        updates.add(payload, digest(payload))
    with pytest.raises(ApiError, match=f"{len(parts) - 1} of {len(parts)} parts") as refusal:
        updates.finish(1)
    assert refusal.value.status == 409 and answer(service) == before
    updates.add(parts[-1], digest(parts[-1]))
    assert updates.finish(1)["sha256"] == new.sha256


def test_what_the_header_announces_is_held_against_what_came(service, updates, monkeypatch):
    _, new = in_parts(service, 1)
    lying = WeightSet(1, new.tensors, new.hashes)
    lying.__dict__["sha256"] = "0" * 64
    [payload] = encode(WeightSet.of(0, dict(service.tensors)), lying)
    updates.start(1, "delta", base_version=0)
    updates.add(payload, digest(payload))
    with pytest.raises(DamagedFile, match=r"0000000000000000\.\.\. was announced"):
        updates.finish(1)
    assert service.core.version == 0 and updates.info()["last_update"]["outcome"] == "abandoned"


def test_parts_of_two_updates_are_not_mixed(service, updates):
    (ours, _), (theirs, _) = in_parts(service, 1), in_parts(service, 2)
    updates.start(1, "delta", base_version=0)
    updates.add(ours[0], digest(ours[0]))
    with pytest.raises(ApiError, match="another update") as refusal:
        updates.add(theirs[1], digest(theirs[1]))
    assert refusal.value.status == 409


def test_finite_weights_whose_model_answers_no_number_are_refused_before_they_serve(service, updates):
    before = answer(service)
    tensors = tensors_of(1)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    payload = pack(tensors)
    with pytest.raises(DamagedFile, match="not a number"):
        updates.at_once(payload, 1, digest(payload))
    assert answer(service) == before and updates.info()["last_update"]["outcome"] == "refused"


def described(**tensors):
    """A safetensors message with this header."""
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + bytes(64)


ODD_HEADERS = [
    *({"w": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}} for kind in ("F4", "F8_E8M0", "F6_E2M3", "X", "")),
    {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]}},
    {"w": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 64]}},
    {"w": {"dtype": "F32", "shape": [[4]], "data_offsets": [0, 16]}},
    {"w": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}},
    {"w": []},
    {"w": {"dtype": {"dtype": "F32"}}},
    {"__metadata__": {"a": {"b": 1}}},
]


@pytest.mark.parametrize("header", ODD_HEADERS, ids=str)
def test_odd_headers_are_damage_and_no_traceback(service_of_module, header):
    payload = described(**header)
    with pytest.raises(DamagedFile):
        WeightUpdates(service_of_module).at_once(payload, 1, digest(payload))


CHANGES = [
    {"parts": "6"}, {"part": []}, {"parts": True}, {"sha256": 5}, {"base_version": {"a": 1}}, {"entries": 7},
    {"entries": [[]]}, {"entries": [["w", "F4", [2], "full", 2, 0, [["raw", 8]], "a"]]}, {"entries": [[["w"]] * 8]},
    {"entries": [["w", "float32", [-2], "full", 2, 0, [["raw", 8]], "a"]]}, {"more": 1},
    {"entries": [["w", "float4_e2m1fn_x2", [2], "full", 2, 0, [["raw", 2]], "a"]]},
    {"entries": [["w", "nn", [2], "full", 2, 0, [["raw", 2]], "a"]]},
    {"entries": [["w", "float32", [1 << 70], "full", 2, 0, [["raw", 8]], "a"]]},
    {"entries": [["w", "float32", [2], "full", 1e400, 0, [["raw", 8]], "a"]]},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_odd_headers_of_a_delta_are_damage_and_no_traceback(change):
    content = {"base_version": None, "version": 1, "base_sha256": None, "sha256": "a", "part": 0, "parts": 1, **change}
    packed = zlib.compress(json.dumps({"entries": [], **content}).encode())
    head = struct.pack("<8sQI", b"ISTHMDL1", 20 + len(packed) + 8 + 32, len(packed))
    body = head + packed + bytes(8)
    with pytest.raises(DamagedFile):
        apply(None, [body + hashlib.sha256(body).digest()])


def test_a_deeply_nested_header_of_a_delta_is_damage():
    packed = zlib.compress(b"[" * 100_000)
    head = struct.pack("<8sQI", b"ISTHMDL1", 20 + len(packed) + 32, len(packed))
    with pytest.raises(DamagedFile, match="header"):
        apply(None, [head + packed + hashlib.sha256(head + packed).digest()])
