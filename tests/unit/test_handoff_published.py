"""`isthmus handoff CHECKPOINT` as a user runs it: what it seals, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from isthmus.cli import cli
from isthmus.data.corpus import completion_of, prompt_ids, run_tokenizer, sft_documents
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.canary import Canary
from isthmus.engines.local.api.keys import Keyring
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.files.golden import read_golden
from isthmus.model.model import Model
from isthmus.parity.capture import GoldenSet
from isthmus.parity.seal import read_verdict, standing
from isthmus.progress import Watch
from isthmus.recipe.read import parse_recipe
from isthmus.run import RunFolder
from isthmus.stages import serve
from isthmus.stages.handoff import crossing
from isthmus.tasks import load_tasks, seeded, split_completion, tasks_of
from isthmus.tasks.jsonl import JsonlTask
from tests.support.bundles import published, taught
from tests.support.live_server import call, live
from tests.support.sampled import SampledHere, odd_is_right
from tests.support.small_dense import dense_architecture

MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DENSE = dense_architecture("llama", vocab_size=300, initializer_range=0.05)
LOOSE = ("--max-mean-kl", "1", "--max-chip-kl", "0.5")


def chatml_tokenizer() -> Tokenizer:
    """One that knows no <think>, as those of most published models do not."""
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["What is seven plus two? Nine."] * 3, trainer)
    return Tokenizer(bpe, CHATML, bos=None, eos="<|im_end|>")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in bf16 with ChatML and two ends of a sequence."""
    folder = tmp_path_factory.mktemp("published") / "small-instruct"
    tokenizer = chatml_tokenizer()
    model = Model(DENSE).initialise(0)
    chat = "<|im_start|>user\nWhat is {} plus {}?<|im_end|>\n<|im_start|>assistant\n It is a number."
    texts = [tokenizer.encode(chat.format(number, more)) for number in range(10, 22) for more in (number + 2, "one")]
    model = taught(Model(DENSE).initialise(0), [text[: min(map(len, texts))] for text in texts], steps=60)
    published(folder, model)
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "mine.jsonl"
    asked = [f"What is {number} plus {number + 2}?" for number in range(24)]
    path.write_text("".join(json.dumps({"prompt": one, "completion": " It is a number."}) + "\n" for one in asked))
    return path


def handoff(*arguments: object) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(cli, ["handoff", *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


def test_one_command_seals_a_bundle_that_can_be_served_and_checks_itself(source: Path, prompts: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    said = handoff(source, "--format", "w8a8", "--prompts", prompts, "--out", out, *LOOSE)
    assert f"sealed {out}" in said and f"isthmus serve {out}" in said
    assert standing(out).state == "sealed"
    verdict = read_verdict(out)
    assert verdict is not None and {check.layer for check in verdict.checks} >= {"files", "config", "modules", "tokens"}
    assert GoldenSet(out).listed.origin == "mine.jsonl"
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == [1, 2, 5], "those of generation_config.json, and that of config.json"
    golden, model = read_golden(out), read_bundle(out).build()
    assert golden is not None and len(golden.answers) == 8
    for answer in golden.answers:
        with torch.no_grad():
            rows = model(torch.tensor([[*answer.prompt, *answer.tokens]]))[0, len(answer.prompt) - 1 : -1]
        assert rows.argmax(-1).tolist() == answer.tokens
    service = serve.open_service(out, serve.Serving(threads=1))
    try:
        assert service.is_sealed and service.golden == golden
        assert Canary(service, golden, bound=0.1).run().outcome == "ok"
        with live(serve.open_server(out, service, serve.Serving(), Keyring([]), Watch(quiet=True))) as port:
            asked = {"prompt": [5, 6], "max_tokens": 4, "logit_bias": {"2": 100}}
            _, stopped = call(port, "POST", "/v1/completions", asked)
            _, gone_on = call(port, "POST", "/v1/completions", {**asked, "ignore_eos": True})
        assert [one["choices"][0]["finish_reason"] for one in (stopped, gone_on)] == ["stop", "length"]
        assert stopped["usage"]["completion_tokens"] == 1, "the second of the model's ends is one as well"
    finally:
        service.core.stop()


def test_a_task_is_answered_by_both_models_and_is_in_the_verdict(source: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(crossing, "LocalEngine", SampledHere)
    monkeypatch.setattr(JsonlTask, "accuracy", odd_is_right)
    task = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"What is {number} plus one?", "answer": str(number + 1)} for number in range(40)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "bundle"
    options = ("--task", task, "--problems", 30, "--max-new-tokens", 8, "--max-accuracy-drop", 0.5, *LOOSE)
    handoff(source, "--format", "bf16", "--out", out, *options)
    verdict = read_verdict(out)
    assert verdict is not None and verdict.verdict == "pass"
    found = {check.name: check for check in verdict.checks}
    accuracy = found["accuracy, target minus reference"].figure
    assert accuracy is not None and accuracy.low is not None and "30 held-out problems" in accuracy.source
    assert any(check.layer == "engine" for check in verdict.checks)
    assert json.loads((out / "examples.json").read_text())[0] == rows[0]["prompt"]
    ours = GoldenSet(out).listed
    assert ours.origin == f"the checkpoint's own answers to {task}"
    theirs = AutoTokenizer.from_pretrained(source)
    asked = [{"role": "user", "content": rows[0]["prompt"]}]
    expected = theirs.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = theirs(expected, add_special_tokens=False)["input_ids"]
    golden = read_golden(out)
    assert golden is not None and golden.answers[0].prompt == ids, "the template of the model, and no <think>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "sums.jsonl"], "nothing else is left behind"


def test_an_exporter_that_loses_scales_is_refused_with_the_module_and_leaves_its_verdict(
    source: Path, prompts: Path, tmp_path: Path, monkeypatch
):
    healthy = type(get_format("w8a8")).export_one

    def loses_scales(self, name, tensor, architecture, calibration=None):
        stored = healthy(self, name, tensor, architecture, calibration)
        if name == "model.layers.1.mlp.down_proj.weight":
            stored["model.layers.1.mlp.down_proj.weight_scale"][:10] = 0
        return stored

    monkeypatch.setattr(type(get_format("w8a8")), "export_one", loses_scales)
    out = tmp_path / "bundle"
    with pytest.raises(GateRefused, match=r"model\.layers\.1\.mlp\.down_proj"):
        handoff(source, "--format", "w8a8", "--prompts", prompts, "--out", out, *LOOSE)
    assert standing(out).state == "refused" and not (out / "seal.json").exists()
    verdict = read_verdict(out)
    assert verdict is not None and "down_proj" in (verdict.culprit or "")


def test_a_format_beyond_its_budget_is_refused_with_what_costs_less(source: Path, prompts: Path, tmp_path: Path):
    with pytest.raises(GateRefused, match=r"what the format costs[\s\S]*--balance"):
        handoff(source, "--format", "w8a8", "--prompts", prompts, "--out", tmp_path / "b", "--max-mean-kl", "1e-9")


def test_a_chip_that_cannot_run_the_format_refuses_it(source: Path, prompts: Path, tmp_path: Path):
    arguments = (source, "--format", "mxfp8", "--prompts", prompts, "--out", tmp_path / "b")
    with pytest.raises(GateRefused, match="'mxfp8' on ascend-910b-313t"):
        handoff(*arguments, "--target", "ascend-910b-313t")
    assert standing(tmp_path / "b").state == "refused"


def test_random_tokens_are_told_of(source: Path, tmp_path: Path):
    said = handoff(source, "--format", "bf16", "--out", tmp_path / "b", "--target", "ascend-910b-313t")
    assert "golden prompts are random tokens" in said
    assert GoldenSet(tmp_path / "b").listed.synthetic
    verdict = read_verdict(tmp_path / "b")
    assert verdict is not None and verdict.rehearsed and "ascend-910b-313t" in verdict.target


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--format says what to make of it"),
        (["--format", "w8"], "unknown format 'w8'"),
        (["--format", "bf16", "--again"], "--run, --set and --again go with a run"),
        (["--format", "bf16", "--task", "sums"], "neither a file .* nor 'countdown'"),
        (["--format", "bf16", "--task", "countdown", "--target", "cuda"], "not on cuda"),
        (["--format", "bf16", "--target", "h20"], None),
        (["--format", "bf16", "--dtype", "fp4"], "unknown dtype 'fp4'; known: fp32"),
        (["--format", "w8a8_static"], "needs to see what the model computes"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, arguments: list[str], reason: str | None
):
    if reason is None:
        assert "sealed" in handoff(source, *arguments, "--out", tmp_path / "b")
        return
    with pytest.raises(IsthmusError, match=reason):
        handoff(source, *arguments, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_options_of_a_checkpoint_are_refused_for_a_run(tmp_path: Path):
    with pytest.raises(IsthmusError, match="--prompts is for a checkpoint"):
        handoff("recipes/tiny.toml", "--run", tmp_path / "run", "--prompts", __file__)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_the_template_and_the_ends_of_its_checkpoint(source: Path, tmp_path: Path):
    """What prompts end in, transformers and engines render from the same template; the model is taught the rest."""
    rate = {"name": "adamw", "learning_rate": 1e-3}
    recipe = parse_recipe(
        {
            "name": "small",
            "model": {"from": str(source)},
            "pools": {"home": {"chip": "cpu", "threads": 1}},
            "place": {"train": ["home"], "rollout": ["home"], "serve": ["home"]},
            "tasks": {"countdown": {"teacher_give_up": 0.9}},
            "step": [{"name": "taught", "kind": "sft", "steps": 1, "batch_size": 4, "optimizer": rate}],
        },
        tmp_path,
    )
    run, tasks = RunFolder.create(tmp_path / "run", recipe), load_tasks(recipe)
    task = tasks["countdown"]
    run_tokenizer(run, [task])
    kept, theirs = run_tokenizer(run, [task]), AutoTokenizer.from_pretrained(source)
    assert kept.ends == Tokenizer.load(source).ends == (1, 2, 5)
    asked = [{"role": "user", "content": task.train[0].prompt}]
    expected = theirs.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert prompt_ids(kept, task.train[0]) == expected
    (document,) = sft_documents(tasks_of(recipe, recipe.named("taught")), kept, recipe.model, 1, seeded("taught", 0))
    assert document.tokens[-1] == kept.eos_id and kept.decode(document.tokens[: document.prompt_length])
    learnt = kept.decode(document.tokens[document.prompt_length : -1])
    assert learnt.startswith("<think>\n") and split_completion(learnt)[1]
    assert split_completion(completion_of(kept, kept.encode("(3*7)+1"))) == ("", "(3*7)+1")
    assert split_completion(completion_of(kept, kept.encode("<think>\nhm</think>\n\n7"))) == ("hm", "7")
    assert split_completion(completion_of(kept, kept.encode("<think>\nhm")))[1] is None
