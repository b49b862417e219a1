"""Tokenizers and chat templates of published checkpoints, against transformers."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError

# Shaped like the template of DeepSeek-R1-Distill-Qwen-7B.
R1_DISTILL = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
# What the templates of Llama 3.1 and Qwen2.5 use beyond that.
CONSTRUCTS = (
    "{{- bos_token }}\n{%- if strftime_now is defined %}{{ strftime_now('%Y') }}{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if loop.index0 > 2 %}{%- break %}{%- endif %}\n"
    "    {%- if message.role == 'skip' %}{%- continue %}{%- endif %}\n"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}\n"
    "    {{- message | tojson(indent=2) }}{{ '<a & b>' | tojson }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 3 + 4?  "},
    {"role": "assistant", "content": "Let me see.</think>\n\n7, naïvely"},
    {"role": "user", "content": "And 4 + 5?"},
]
TEXTS = ["Be brief. What is 3 + 4? Let me see. 7, naïvely And 4 + 5? user assistant system"] * 2
SPECIAL = ["<|begin|>", "<|eot|>", "<|pad|>"]
PLAIN = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]


def write_theirs(folder: Path, template: str | None, **tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE as transformers writes it; the marks of a conversation are not special, as in R1-Distill."""
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    named = {"bos_token": "<|begin|>", "eos_token": "<|eot|>", "pad_token": "<|pad|>", **tokens}
    theirs = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **named)
    theirs.save_pretrained(folder)
    return theirs


def rendered(theirs: PreTrainedTokenizerFast) -> list[int]:
    text = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    return theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [R1_DISTILL, CONSTRUCTS], ids=["R1-Distill", "constructs"])
def test_a_published_template_renders_as_in_transformers(tmp_path: Path, template: str):
    theirs = write_theirs(tmp_path, template)
    assert (tmp_path / "chat_template.jinja").is_file()
    ours = Tokenizer.load(tmp_path)
    assert ours.chat(CONVERSATION) == rendered(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    text = ours.decode(ours.chat(CONVERSATION), skip_special=False)
    assert (str(datetime.now().year) in text) == (template == CONSTRUCTS)


def move_template_into_config(folder: Path, template: object) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change(folder, chat_template=template)


def change(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_template_in_the_config_alone_or_in_a_list_is_found(tmp_path: Path):
    expected = rendered(write_theirs(tmp_path, R1_DISTILL))
    move_template_into_config(tmp_path, R1_DISTILL)
    assert Tokenizer.load(tmp_path).chat(CONVERSATION) == expected
    move_template_into_config(
        tmp_path, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": R1_DISTILL}]
    )
    assert Tokenizer.load(tmp_path).chat(CONVERSATION) == expected


def test_what_we_save_of_a_published_tokenizer_transformers_loads_alike(tmp_path: Path):
    theirs = write_theirs(tmp_path, R1_DISTILL)
    (tmp_path / "again").mkdir()
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert rendered(again) == rendered(theirs)
    assert (again.pad_token, again.bos_token, again.eos_token) == ("<|pad|>", "<|begin|>", "<|eot|>")


def test_nothing_is_added_to_a_template_that_does_not_open_the_thinking(tmp_path: Path):
    theirs = write_theirs(tmp_path, R1_DISTILL.replace("<think>\\n", ""))
    ours = Tokenizer.load(tmp_path)
    assert ours.chat(CONVERSATION) == rendered(theirs) and not ours.opens_thinking


@pytest.mark.parametrize("source", ["special_tokens_map.json", "config.json"])
def test_special_tokens_come_from_where_they_are_named_first(tmp_path: Path, source: str):
    theirs = write_theirs(tmp_path, R1_DISTILL)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in ("bos_token", "eos_token")})
    )
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(IsthmusError, match="names no eos_token"):
        Tokenizer.load(tmp_path)
    content = {
        "special_tokens_map.json": {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|eot|>"},
        "config.json": {"bos_token_id": theirs.bos_token_id, "eos_token_id": [theirs.eos_token_id, 3]},
    }[source]
    (tmp_path / source).write_text(json.dumps(content))
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos, ours.eos) == ("<|begin|>", "<|eot|>")


def test_a_tokenizer_may_have_no_token_for_the_beginning(tmp_path: Path):
    """Qwen2.5: tokenizer_config.json says null, though config.json has a bos_token_id."""
    theirs = write_theirs(tmp_path, R1_DISTILL)
    change(tmp_path, bos_token=None)
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": theirs.bos_token_id}))
    ours = Tokenizer.load(tmp_path)
    assert ours.bos is None and ours.bos_id is None
    assert ours.chat(CONVERSATION) == rendered(theirs)[1:]
    ours.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).bos_token is None


def test_text_leaves_out_special_tokens_and_marks_of_turns_but_not_of_thinking(tmp_path: Path):
    write_theirs(tmp_path, R1_DISTILL)
    ours = Tokenizer.load(tmp_path)
    ids = ours.encode("<|begin|><｜User｜>a<｜Assistant｜><think>b</think>c<|eot|><|pad|>")
    assert ours.decode(ids) == "a<think>b</think>c"


def test_a_tokenizer_without_template_is_refused_unless_it_has_the_tokens_of_ours(tmp_path: Path):
    write_theirs(tmp_path, None)
    assert "<｜User｜>" in Tokenizer.load(tmp_path).chat_template
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<｜User｜>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(IsthmusError, match=r"has no chat template: write one into chat_template\.jinja"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_is_broken_or_reaches_out_is_refused(tmp_path: Path, template: str):
    write_theirs(tmp_path, R1_DISTILL)
    move_template_into_config(tmp_path, template)
    with pytest.raises(IsthmusError, match="the chat template"):
        Tokenizer.load(tmp_path).chat(CONVERSATION)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(tmp_path: Path, file: str):
    write_theirs(tmp_path, R1_DISTILL)
    (tmp_path / file).unlink()
    with pytest.raises(IsthmusError, match=f"has no tokenizer: {file} is missing"):
        Tokenizer.load(tmp_path)
