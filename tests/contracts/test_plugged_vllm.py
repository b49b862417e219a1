"""vLLM with our plug-in behind a URL: recognised, brought versions and deltas, and looked at after each.

The server is a fake around the real plug-in; benchmarks/sentinel.py asks a live vLLM.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from isthmus.engines import EngineError, OtherBase, Sampling
from isthmus.engines.account import compare
from isthmus.engines.channel import Channel
from isthmus.engines.fleet import Fleet
from isthmus.engines.remote import HttpEngine, plugged, prepared
from isthmus.engines.remote.prepared import Prepared
from isthmus.formats import get_format
from isthmus.formats.updates.wire import digest, pack
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle
from tests.support.other_servers import serving
from tests.support.plugged_vllm import FakePlugged

PROMPTS = [[0, 2, 60, 61, 4], [9] * 20]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugged") / "bf16"
    write_small_bundle(folder, "bf16")
    return folder


@pytest.fixture(params=[True, False], ids=["folder", "http"])
def pair(request, bundle, tmp_path):
    with ExitStack() as stack:
        server = stack.enter_context(serving(FakePlugged(bundle)))
        engine = HttpEngine(server.url, exchange=tmp_path / "exchange" if request.param else None)
        engine.start(bundle)
        engine.check_exchange("bf16")
        yield server, engine


def tensors_of(seed):
    model = thinking_model(small_tokenizer(), seed)
    return get_format("bf16").export(model.state_dict(), model.architecture)


def built(tensors):
    return get_format("bf16").build(thinking_model(small_tokenizer()).architecture, tensors)


def logprobs_hold(engine, model, version):
    """What the engine says of its samples is what a model of these weights computes."""
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, Sampling(8, temperature=0.7)), strict=True):
        one = group[0]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *one.tokens]]))[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, -1)[torch.arange(len(one.tokens)), torch.tensor(one.tokens)]
        assert one.version == one.last_version == version
        torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=1e-4)
    return True


def test_it_is_recognised_and_says_how_it_computes(pair):
    assert pair[1].server == "vLLM with the plug-in of isthmus 0.32.0"
    assert pair[1].takes_deltas and pair[1].arithmetic == "fp32"


def test_versions_come_whole_and_as_deltas_and_are_what_is_computed_with(pair):
    server, engine = pair
    told = []
    channel = Channel(engine, deltas=True, snapshot_every=100, tell=lambda *args, **facts: told.append((args, facts)))
    for version, seed in ((4, 1), (5, 2), (6, 3)):
        sent = channel.send(version, tensors_of(seed))
        assert sent.kind == ("snapshot" if version == 4 else "delta") and not server.paused
        assert logprobs_hold(engine, built(tensors_of(seed)), version)
        found = compare(engine.accounts()[0][1], version, tensors_of(seed))
        assert found.wrong == {} and found.seen == len(tensors_of(seed))
    assert told == [] and "weight_v000006" in server.sources[-1]


@pytest.mark.parametrize("through_a_folder", [True, False])
def test_a_version_is_put_together_and_written_once_for_all_engines_of_a_pool(
    through_a_folder, bundle, tmp_path, monkeypatch
):
    done = Counter[str]()

    def counted(module, name):
        act = getattr(module, name)

        def counting(*args, **options):
            done[name] += 1
            return act(*args, **options)

        monkeypatch.setattr(module, name, counting)

    for module, name in ((prepared, "unpack"), (prepared, "apply"), (plugged, "write_version")):
        counted(module, name)
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(FakePlugged(bundle))) for _ in range(3)]
        folders = [tmp_path / f"engine-{number}" if through_a_folder else None for number in range(3)]
        pool, told = Prepared(), []
        pairs = zip(servers, folders, strict=True)
        engines = [HttpEngine(server.url, exchange=folder, prepared=pool) for server, folder in pairs]
        fleet = Fleet(engines, lambda *args, **facts: told.append((args, facts)))
        fleet.start(bundle)
        channel = Channel(fleet, deltas=True, snapshot_every=100, tell=lambda *_, **__: None)
        for version, seed, acts in ((4, 1, {"unpack": 1}), (5, 2, {"apply": 1}), (6, 3, {"apply": 1})):
            done.clear()
            channel.send(version, tensors_of(seed))
            assert done == acts | {"write_version": 1}
            for engine in engines:
                assert logprobs_hold(engine, built(tensors_of(seed)), version)
                assert compare(engine.accounts()[0][1], version, tensors_of(seed)).wrong == {}
        assert len({server.sources[-1] for server in servers}) == 3 and told == []


def test_an_engine_that_was_started_again_needs_all_weights(pair, bundle):
    server, engine = pair
    channel = Channel(engine, deltas=True, snapshot_every=100, tell=lambda *_, **__: None)
    channel.send(4, tensors_of(1))
    server.standing = FakePlugged(bundle).standing
    server.model, server.version = server.standing.live, "default"
    with pytest.raises(OtherBase):
        engine.update_delta([], 4, 5, "")
    assert channel.send(5, tensors_of(2)).kind == "fallback"
    assert logprobs_hold(engine, built(tensors_of(2)), 5)


def test_a_damaged_message_and_one_of_another_model_change_nothing(pair):
    server, engine = pair
    payload = pack(tensors_of(1))
    engine.update(payload, 4, digest(payload))
    with pytest.raises(EngineError, match="SHA-256"):
        engine.update(payload[:-1], 5, digest(payload))
    lacking = pack({name: one for name, one in tensors_of(2).items() if name != "model.norm.weight"})
    with pytest.raises(EngineError, match=r"nothing for model\.norm\.weight"):
        engine.update(lacking, 5, digest(lacking))
    assert not server.paused and not server.active and logprobs_hold(engine, built(tensors_of(1)), 4)


def test_an_update_that_a_dead_trainer_left_open_is_closed(pair):
    server, engine = pair
    server.active = True
    payload = pack(tensors_of(1))
    engine.update(payload, 4, digest(payload))
    assert logprobs_hold(engine, built(tensors_of(1)), 4)


def test_what_an_engine_does_to_its_weights_is_named(pair):
    server, engine = pair
    server.spoil = lambda model: model.model.norm.weight.mul_(2)
    payload = pack(tensors_of(1))
    engine.update(payload, 4, digest(payload))
    assert compare(engine.accounts()[0][1], 4, tensors_of(1)).wrong.keys() == {"model.norm.weight"}


def test_what_is_served_to_the_engine_is_told_to_nobody_else(bundle):
    with serving(FakePlugged(bundle)) as server:
        engine = HttpEngine(server.url)
        engine.start(bundle)
        payload = pack(tensors_of(1))
        engine.update(payload, 4, digest(payload))
        source = server.sources[0]
        with urllib.request.urlopen(f"{source}/sha256.json") as answer:
            assert answer.status == 200
        for path in ("", source.rpartition("/")[0].removeprefix(source[: source.index("/", 8)])):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(source[: source.index("/", 8)] + path + "/")


def test_old_versions_do_not_pile_up(pair, tmp_path):
    server, engine = pair
    for version in (4, 5, 6):
        payload = pack(tensors_of(version))
        engine.update(payload, version, digest(payload))
    if (exchange := tmp_path / "exchange").exists():
        assert [path.name for path in exchange.iterdir()] == ["weight_v000006"]
        assert Path(server.sources[-1]).is_dir()
