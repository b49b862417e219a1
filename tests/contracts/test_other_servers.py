"""Engines of other makes behind a URL: samples with true log-probabilities, weights through a folder, clear refusals.

The servers are fakes that answer as the real ones do; tests/contracts/test_live_vllm.py asks a real one.
"""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack

import pytest
import torch

from isthmus.engines import EngineError, Sampling
from isthmus.engines.channel import Channel
from isthmus.engines.remote import HttpEngine
from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.updates.publisher import Publisher
from isthmus.formats.updates.version_folder import VersionWriter
from isthmus.formats.updates.wire import digest, pack, unpack
from isthmus.tools.follow import Follower
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle
from tests.support.other_servers import FakeSgLang, FakeVllm, serving

PROMPTS = [[0, 2, 60, 61, 4], [0, 2, 70, 4], [9] * 20]
MAKES = {"vllm": FakeVllm, "sglang": FakeSgLang}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "bf16"
    write_small_bundle(folder, "bf16")
    return folder


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=MAKES)
def make(request):
    return MAKES[request.param]


@pytest.fixture
def pair(make, bundle, tmp_path, stack):
    """A server and the engine that speaks to it."""
    server = stack.enter_context(serving(make(bundle)))
    engine = HttpEngine(server.url, exchange=tmp_path / "exchange")
    engine.start(bundle)
    return server, engine


def payload_of(seed, format_name="bf16"):
    model = thinking_model(small_tokenizer(), seed)
    tensors = get_format(format_name).export(model.state_dict(), model.architecture)
    return pack(tensors), get_format(format_name).build(model.architecture, tensors)


def expected_logprobs(model, prompt, tokens, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)[torch.arange(len(tokens)), torch.tensor(tokens)]


def test_the_server_is_recognised_with_its_version(pair, make):
    assert pair[1].server == {FakeVllm: "vLLM 0.32.0", FakeSgLang: "SGLang 0.5.23"}[make]
    assert pair[1].version == 0


def test_samples_come_in_order_with_the_logprobs_of_the_sampled_distribution(pair, bundle):
    model = read_bundle(bundle).build()
    found = pair[1].generate(PROMPTS, Sampling(12, temperature=0.8, seed=5, n=3))
    assert [len(group) for group in found] == [3, 3, 3]
    for prompt, group in zip(PROMPTS, found, strict=True):
        assert len({tuple(one.tokens) for one in group}) > 1
        for one in group:
            ended = one.tokens[-1] == 1
            assert one.finish_reason == ("stop" if ended else "length") and (ended or len(one.tokens) == 12)
            expected = expected_logprobs(model, prompt, one.tokens, 0.8)
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_given_sequences_are_scored_token_by_token(pair, bundle):
    model = read_bundle(bundle).build()
    for sequence, found in zip(PROMPTS, pair[1].score(PROMPTS), strict=True):
        rows = torch.log_softmax(model(torch.tensor([sequence]))[0, :-1].double(), -1)
        assert [one.best for one in found] == rows.argmax(-1).tolist()
        expected = expected_logprobs(model, sequence[:1], sequence[1:], 1.0).tolist()
        assert [one.logprob for one in found] == pytest.approx(expected, abs=1e-4)
        assert [one.best_logprob for one in found] == pytest.approx(rows.amax(-1).tolist(), abs=1e-4)
    assert pair[1].score([]) == []


def test_a_server_that_does_not_score_prompts_is_named(bundle, stack):
    server = FakeVllm(bundle)
    server.with_ids = False
    stack.enter_context(serving(server))
    with pytest.raises(EngineError, match="does not score prompts"):
        HttpEngine(server.url).score(PROMPTS)


def test_seeds_belong_to_their_prompts_and_no_two_samples_share_draws(pair):
    engine = pair[1]
    alone = engine.generate(PROMPTS[1:2], Sampling(12, n=2), seeds=[77])
    together = engine.generate(PROMPTS, Sampling(12, n=2), seeds=[76, 77, 78])
    assert [one.tokens for one in together[1]] == [one.tokens for one in alone[0]]
    same = engine.generate([PROMPTS[0]] * 3, Sampling(12, n=2, seed=7))
    assert len({tuple(one.tokens) for group in same for one in group}) == 6
    near = engine.generate([PROMPTS[0]] * 2, Sampling(12, n=2), seeds=[7, 8])
    assert len({tuple(one.tokens) for group in near for one in group}) == 4


def test_an_update_goes_through_the_folder_and_a_damaged_one_changes_nothing(pair, bundle, tmp_path):
    server, engine = pair
    sampling = Sampling(12, temperature=0.0)
    before = engine.generate(PROMPTS, sampling)
    first, model = payload_of(1)
    engine.update(first, 11, digest(first))
    after = engine.generate(PROMPTS, sampling)
    assert [g[0].tokens for g in after] != [g[0].tokens for g in before]
    assert {(g[0].version, g[0].last_version) for g in before} == {(0, 0)}
    assert {(g[0].version, g[0].last_version) for g in after} == {(11, 11)}
    for prompt, (one,) in zip(PROMPTS, after, strict=True):
        expected = expected_logprobs(model, prompt, one.tokens, 1.0)
        torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=1e-4)
    flipped = bytearray(first)
    flipped[len(first) // 2] ^= 1
    wrong_format, _ = payload_of(0, "fp32")
    for payload, sha256, reason in (
        (bytes(flipped), digest(first), "SHA-256"),
        (wrong_format, digest(wrong_format), "do not fit"),
        (b"not weights", digest(b"not weights"), "safetensors"),
    ):
        with pytest.raises(EngineError, match=reason):
            engine.update(payload, 12, sha256)
    assert [g[0].tokens for g in engine.generate(PROMPTS, sampling)] == [g[0].tokens for g in after]
    second, _ = payload_of(2)
    engine.update(second, 13, digest(second))
    assert [path.name for path in (tmp_path / "exchange").iterdir()] == ["weights-13"]
    assert HttpEngine(server.url).version == 13


def test_a_follower_puts_versions_together_for_servers_that_read_whole_weights(pair, make, tmp_path):
    """What is published as a delta reaches these servers as a whole bundle, by their own way of reloading."""
    engine = pair[1]
    said, publisher, writer = [], Publisher(snapshot_every=100), VersionWriter(tmp_path / "versions", "bf16")
    follower = Follower(tmp_path / "versions", engine, said.append)
    for version, seed in ((11, 1), (12, 2)):
        payload, model = payload_of(seed)
        writer.write(publisher.publish(version, unpack(payload, digest(payload))))
        assert follower.catch_up() == 0
        for prompt, (one,) in zip(PROMPTS, engine.generate(PROMPTS, Sampling(12, temperature=0.0)), strict=True):
            expected = expected_logprobs(model, prompt, one.tokens, 1.0)
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=1e-4)
            assert one.version == version
    assert "put together from a delta" in said[-1]
    with pytest.raises(EngineError, match="takes new weights as a whole"):
        engine.update_delta([], 12, 13, "")
    told = []
    channel = Channel(engine, deltas=True, snapshot_every=100, tell=lambda name, **facts: told.append((name, facts)))
    assert channel.send(14, unpack(payload, digest(payload))).kind == "full"
    assert told == [("fallback", {"what": "full weights at every update", "why": "this engine takes no deltas"})]


def test_vllm_is_paused_for_an_update_and_runs_again_after_a_failed_one(bundle, tmp_path, stack):
    server = stack.enter_context(serving(FakeVllm(bundle)))
    engine = HttpEngine(server.url, exchange=tmp_path / "exchange")
    engine.start(bundle)
    payload, _ = payload_of(1)
    engine.update(payload, 1, digest(payload))
    server.calls.clear()
    engine.update(payload, 2, digest(payload))
    steps = ["/pause", "/collective_rpc", "/update_weight_version", "/reset_prefix_cache", "/resume"]
    assert server.calls == steps
    server.load = lambda folder: read_bundle(tmp_path / "nothing")
    with pytest.raises(EngineError, match=r"is not a bundle(?s:.)*restart it"):
        engine.update(payload, 3, digest(payload))
    assert not server.paused and engine.version == 2


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_a_vllm_whose_reload_changes_the_served_weights_is_found_out(bundle, tmp_path, stack, factor):
    server = stack.enter_context(serving(FakeVllm(bundle)))
    server.reload_factor = factor
    engine = HttpEngine(server.url, exchange=tmp_path / "exchange")
    engine.start(bundle)
    payload, _ = payload_of(1)
    with pytest.raises(EngineError, match="a reload of the weights that it serves changes"):
        engine.update(payload, 1, digest(payload))
    assert server.version == "default" and not server.paused


def test_sglang_goes_back_to_the_last_good_weights_when_loading_fails(bundle, tmp_path, stack):
    server = stack.enter_context(serving(FakeSgLang(bundle)))
    engine = HttpEngine(server.url, exchange=tmp_path / "exchange")
    engine.start(bundle)
    first, second = (payload_of(seed)[0] for seed in (1, 2))
    engine.update(first, 4, digest(first))
    before = engine.generate(PROMPTS, Sampling(8, temperature=0.0))
    server.broken = 1
    with pytest.raises(EngineError, match=r"out of memory(?s:.)*weights-4 serve again"):
        engine.update(second, 5, digest(second))
    again = engine.generate(PROMPTS, Sampling(8, temperature=0.0))
    assert again == before and again[0][0].version == 4
    server.broken = 2
    with pytest.raises(EngineError, match="Restart it"):
        engine.update(second, 5, digest(second))


def test_the_versions_of_a_sample_enclose_an_update_in_its_middle(make, bundle, tmp_path, stack):
    server = stack.enter_context(serving(make(bundle)))
    server.spans = False
    engine = HttpEngine(server.url, exchange=tmp_path / "exchange")
    engine.start(bundle)
    payload, _ = payload_of(1)
    generating, updated = threading.Event(), threading.Event()
    plain_sample = server.sample

    def sample(*arguments):
        if not generating.is_set():
            generating.set()
            assert updated.wait(60)
        return plain_sample(*arguments)

    server.sample = sample
    found = []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(PROMPTS[:1], Sampling(4))))
    thread.start()
    assert generating.wait(60)
    engine.update(payload, 9, digest(payload))
    updated.set()
    thread.join()
    assert (found[0][0].version, found[0][0].last_version) == (0, 9)


@pytest.mark.parametrize("fault", ["raw", "logits"])
def test_logprobs_of_another_distribution_are_refused_at_the_start(make, bundle, stack, fault):
    server = stack.enter_context(serving(make(bundle, **{fault: True})))
    with pytest.raises(EngineError, match="not those of the distribution it samples"):
        HttpEngine(server.url).start(bundle)


def test_what_a_server_lacks_is_refused_with_what_to_start_it_with(bundle, tmp_path, stack):
    payload, _ = payload_of(1)
    closed = stack.enter_context(serving(FakeVllm(bundle, dev=False)))
    engine = HttpEngine(closed.url, exchange=tmp_path / "exchange")
    engine.start(bundle)
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        engine.update(payload, 1, digest(payload))
    engine.exchange = None
    engine.start(bundle)
    with pytest.raises(EngineError, match="exchange=FOLDER"):
        engine.update(payload, 1, digest(payload))
    closed.with_ids = False
    with pytest.raises(EngineError, match=r"token ids.*vLLM 0\.10\.2"):
        engine.generate(PROMPTS, Sampling(4))
    seedless = stack.enter_context(serving(FakeSgLang(bundle, deterministic=False)))
    with pytest.raises(EngineError, match="--enable-deterministic-inference"):
        HttpEngine(seedless.url).start(bundle)


def test_a_server_that_nobody_knows_generates_but_takes_no_weights(bundle, stack):
    server = stack.enter_context(serving(FakeVllm(bundle, dev=False, owner="somebody")))
    engine = HttpEngine(server.url)
    engine.start(bundle)
    assert len(engine.generate(PROMPTS, Sampling(4))) == 3
    payload, _ = payload_of(1)
    with pytest.raises(EngineError, match="use vLLM, SGLang or isthmus"):
        engine.update(payload, 1, digest(payload))


def test_older_routes_of_sglang_are_found(bundle, stack):
    server = stack.enter_context(serving(FakeSgLang(bundle, old_routes=True)))
    engine = HttpEngine(server.url)
    engine.start(bundle)
    assert engine.server == "SGLang 0.5.23" and len(engine.generate(PROMPTS, Sampling(4))) == 3


def test_the_words_of_a_refusal_are_repeated(pair):
    with pytest.raises(EngineError, match="vocab"):
        pair[1].generate([[5, 100_000]], Sampling(2))


def test_a_sample_that_the_server_gave_up_is_no_sample(bundle, stack):
    server = stack.enter_context(serving(FakeVllm(bundle)))
    engine = HttpEngine(server.url)
    engine.start(bundle)
    plain_choice = server.choice
    server.choice = lambda *arguments: plain_choice(*arguments) | {"finish_reason": "abort"}
    with pytest.raises(EngineError, match="abort"):
        engine.generate(PROMPTS, Sampling(4))


def test_a_sample_that_was_cut_short_is_refused(pair):
    with pytest.raises(EngineError, match="cut a sample after 6 of 20 tokens"):
        pair[1].generate([[5] * 90], Sampling(20, temperature=0.0))


def test_the_key_travels_and_a_wrong_one_is_an_error(make, bundle, stack):
    server = stack.enter_context(serving(make(bundle, key="secret")))
    HttpEngine(server.url, api_key="secret").start(bundle)
    with pytest.raises(EngineError, match="Unauthorized"):
        HttpEngine(server.url, api_key="guess").start(bundle)


def test_a_server_that_comes_up_late_is_waited_for(make, bundle, stack):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    engine = HttpEngine(f"http://127.0.0.1:{port}", start_wait_s=0.0)
    with pytest.raises(EngineError, match="does not answer"):
        engine.start(bundle)
    server = stack.enter_context(serving(make(bundle)))
    server.healthy_after = 3
    late = HttpEngine(server.url)
    late.start(bundle)
    assert server.calls.count("/health") >= 4
    server.healthy_after = 1_000_000
    with pytest.raises(EngineError, match=r"not healthy \(503\): starting"):
        HttpEngine(server.url, start_wait_s=0.3).start(bundle)


def test_a_server_that_hangs_is_an_error_after_the_timeout(bundle, stack):
    server = stack.enter_context(serving(FakeVllm(bundle)))
    engine = HttpEngine(server.url, timeout_s=1.0)
    engine.start(bundle)
    release = threading.Event()
    server.completions = lambda _: release.wait(60) and {}
    with pytest.raises(EngineError, match="did not answer /v1/completions within 1 s"):
        engine.generate(PROMPTS[:1], Sampling(2))
    release.set()
