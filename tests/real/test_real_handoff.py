"""The hand-off of the real model's first layers, by one command: ChatML, tied embeddings, nine heads, no thinking."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from isthmus.cli import cli
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.canary import Canary
from isthmus.parity.capture import GoldenSet
from isthmus.parity.seal import read_verdict, standing
from isthmus.stages import serve
from tests.support.real_model import first_layers, own_words

pytestmark = pytest.mark.real
ANSWERS = Path(__file__).with_name("answers.jsonl")


def test_the_real_model_is_handed_off_and_served(smollm2: Path, tmp_path: Path) -> None:
    source, out = first_layers(smollm2, tmp_path / "source", 1), tmp_path / "out"
    beginnings = [json.loads(line)["tokens"][-16:] for line in ANSWERS.read_text().splitlines()[:4]]
    prompts = own_words(source, tmp_path / "words.jsonl", beginnings)
    options = ["--format", "bf16", "--prompts", str(prompts), "--out", str(out)]
    done = CliRunner().invoke(cli, ["handoff", str(source), *options], standalone_mode=False)
    assert done.exception is None, done.exception
    assert standing(out).state == "sealed"
    verdict, listed = read_verdict(out), GoldenSet(out).listed
    assert verdict is not None and verdict.verdict == "pass" and listed.cost is not None
    assert listed.cost.kl == 0, "the weights are bf16"
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    theirs = AutoTokenizer.from_pretrained(smollm2)
    text = theirs.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert Tokenizer.load(out).chat(asked) == theirs(text, add_special_tokens=False)["input_ids"]
    service = serve.open_service(out, serve.Serving(threads=1))
    try:
        assert service.golden is not None and service.is_sealed
        assert Canary(service, service.golden, bound=0.1).run().outcome == "ok"
    finally:
        service.core.stop()
