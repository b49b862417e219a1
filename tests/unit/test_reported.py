"""What others reported of other programs, tried here: each test names the reports whose right answer it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers

from isthmus.chips.rehearse import RehearsalRefused
from isthmus.chips.rehearse.dispatch import enforce
from isthmus.data.chat_template import ChatTemplate
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.prepare import chat_text
from isthmus.engines.local.api.text import CharacterStream, Rules, Vocabulary
from isthmus.engines.local.api.token_names import by_name, chat_name
from isthmus.errors import IsthmusError
from isthmus.tasks import Problem, completion_text, jsonl
from tests.support.chat_templates import CALL, QWEN3
from tests.support.live_server import refused
from tests.unit.test_api import CHAT, TOOLS, Served, hermes, serve
from tests.unit.test_thinking import ask, service
from tests.unit.test_tokenizer_kinds import KINDS, OURS, streamed
from tests.unit.test_values import UP, all_scales, changed, convert, e8m0, original

__all__ = ["hermes", "original", "serve"]


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [("why</think>\n\nHello!", "why", "Hello!"), ("cut before its end", "cut before its end", "")],
)
def test_thinking_that_the_template_opened_ends_at_its_mark_alone(hermes: Served, text, reasoning, content):
    """mudler/LocalAI 11790, nosana-ci/pipeline-templates 171: it came as content, whole or with the mark in it."""
    message = hermes.chat(text).choices[0].message
    assert (message.reasoning_content, message.content) == (reasoning, content)


def test_a_template_that_is_told_not_to_think_leaves_the_whole_answer_in_content(hermes: Served):
    """OpenWhispr/openwhispr 809: everything went to reasoning_content, and content was empty."""
    told = {"chat_template_kwargs": {"enable_thinking": False}}
    message = hermes.chat("Just this.", extra_body=told).choices[0].message
    assert (message.reasoning_content, message.content) == (None, "Just this.")


@pytest.mark.parametrize("text", ["The quick brown fox.", "fox  jumps", "  two."])
@pytest.mark.parametrize("spaces", [0, 1, 3])
def test_a_stream_neither_takes_two_spaces_nor_loses_what_follows_them(text: str, spaces: int):
    """ml-explore/mlx-lm 1754, drumih/turbo-fieldfare 118, Lightning-AI/litgpt 2326."""
    space = KINDS["llama2"].token_to_id("▁")
    tokens = [space] * spaces + OURS["llama2"].encode(text)
    assert streamed(OURS["llama2"], tokens) == OURS["llama2"].decode(tokens) == " " * spaces + text


@pytest.mark.parametrize("ignored", [False, True])
def test_each_end_of_several_ends_or_none_does(serve, ignored: bool):
    """NVIDIA/TensorRT-Model-Connect 640, vllm-project/vllm 4589: one of two ends was read."""
    served = serve("llama")
    tokenizer = served.service.tokenizer
    before = tokenizer.ends
    tokenizer.ends = (*before, 9)
    try:
        served.chat("Rain", extra_body={"ignore_eos": ignored, "min_tokens": 0})
    finally:
        tokenizer.ends = before
    asked = served.asked()
    assert (9 in asked.stop_tokens) == (not ignored) and asked.ignore_eos == ignored


def half_a_face() -> BpeTokenizer:
    """Byte-level, with a token of a space and the first bytes of a character, as DeepSeek's has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, *face = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" 👐")[0][0]
    merges = [(space, face[0]), (space + face[0], face[1]), (space + face[0] + face[1], face[2])]
    pieces = [*alphabet, *(a + b for a, b in merges)]
    bpe = BpeTokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(["<end>"])
    return bpe


def test_a_token_of_a_space_and_half_a_character_has_its_bytes_and_a_name_of_its_own():
    """standardcompletions/rfcs 2, vllm-project/vllm 34875: names were U+FFFD or empty, and alternatives became one."""
    bpe = half_a_face()
    tokenizer = Tokenizer(bpe, QWEN3, None, "<end>")
    vocabulary = Vocabulary(tokenizer)
    half, *rest = bpe.encode(" 👐").ids
    assert vocabulary.bytes_of(half) == " 👐".encode()[:4] and len(rest) == 1
    assert chat_name(vocabulary, half) == " \\xf0\\x9f\\x91" or chat_name(vocabulary, half) == "\\x20\\xf0\\x9f\\x91"
    quotes = [bpe.encode(sign).ids[-1] for sign in "“”"]
    assert len(by_name(vocabulary, quotes[0], [(quotes[0], -0.1), (quotes[1], -0.2), (half, -0.3)])) == 3
    stream = CharacterStream(tokenizer, Rules(), [])
    assert "".join([stream.push(half), stream.push(rest[0]), stream.flush()]) == " 👐"


CALLING = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


def test_a_call_without_content_stays_in_the_conversation(hermes: Served):
    """cubist38/mlx-openai-server 205: the turn was dropped; waybarrios/vllm-mlx 84: content in parts beside calls."""
    calls = [{**CALL, "function": {"name": "look", "arguments": '{"city": "Oslo"}'}}]
    for content in (None, [{"type": "text", "text": "I look."}], ""):
        turns = [CALLING[0], {"role": "assistant", "content": content, "tool_calls": calls}, CALLING[2]]
        hermes.chat("</think>Rain.", messages=turns, tools=TOOLS)
        prompt = hermes.service.tokenizer.decode(hermes.asked().prompts[0], skip_special=False)
        assert '"Oslo"' in prompt and ("I look." in prompt) == isinstance(content, list) and "None" not in prompt


def test_a_turn_without_the_key_content_renders():
    """huggingface/speech-to-speech 425: a template that joins texts raised, where content was left out of a call."""
    template = "{% for m in messages %}{{ '[' + m.role + '|' + m.content + ']' }}{% endfor %}"
    calls = [{**CALL, "function": {"name": "look", "arguments": "{}"}}]
    turns = [CALLING[0], {"role": "assistant", "tool_calls": calls}, CALLING[2]]
    assert chat_text(service(template), ask(turns), with_tools=False) == "[user|Weather?][assistant|][tool|rain]"


def test_thinking_between_calls_is_kept_and_that_of_earlier_questions_is_the_templates_affair(hermes: Served):
    """vercel/ai 17991, trpc-group/trpc-agent-go 787: thinking was put into the answer, or dropped between calls."""
    called = {**CALLING[1], "reasoning_content": "look it up"}
    ours = ChatTemplate(QWEN3)
    within = ours.render([CALLING[0], called, CALLING[2]])
    assert "<think>\nlook it up\n</think>" in within
    answered = [{"role": "assistant", "content": "Rain.", "reasoning_content": "so it rains"}]
    after = ours.render([CALLING[0], called, CALLING[2], *answered, {"role": "user", "content": "And now?"}])
    assert "look it up" not in after and "so it rains" not in after and "Rain." in after


def test_bytes_are_no_factors_and_a_scale_under_another_name_or_none_is_told(original: Path, tmp_path: Path):
    """jundot/omlx 2159 (450,000 times too large), leejet/stable-diffusion.cpp 1898, vllm-project/vllm 54722."""
    cases = {
        "raw": (all_scales(lambda scale: e8m0(scale).view(torch.uint8)), "bytes are E8M0 only where"),
        "renamed": (lambda all_: all_.update({f"{UP}_scale": all_.pop(f"{UP}_scale_inv")}), "up_proj.weight_scale"),
        "missing": (lambda all_: all_.pop(f"{UP}_scale_inv"), "up_proj.weight"),
    }
    for name, (change, words) in cases.items():
        with pytest.raises(IsthmusError, match=words):
            convert(changed(original, tmp_path / name, change), tmp_path / f"{name}-bundle", "bf16")
        assert not (tmp_path / f"{name}-bundle").exists()


def test_a_weight_that_a_format_leaves_alone_is_widened_with_its_scales(original: Path, tmp_path: Path):
    """kekzl/imp 1450: weights that were refused a format went on as raw e4m3, and their scales did not."""
    convert(original, tmp_path / "b", "bf16")
    kept = load_file(next((tmp_path / "b").glob("*.safetensors")))
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept.values())
    source = load_file(original / "model.safetensors")
    rows = source[UP].float()[:128, :128] * source[f"{UP}_scale_inv"][0, 0]
    assert torch.equal(kept[UP][:128, :128], rows.bfloat16())


@pytest.mark.parametrize("chip", ["mi300x", "mi308x", "mi325x"])
def test_each_chip_of_one_instruction_set_has_its_one_fp8(chip: str):
    """ROCm/aiter 3807, triton-lang/triton 6542, meta-pytorch/tritonbench 553: e4m3fn, where there is e4m3fnuz alone."""
    one, operator = torch.ones(()), "_scaled_mm"
    with enforce(chip):
        for kind in (torch.float8_e4m3fnuz, torch.float8_e4m3fn):
            a, b = (torch.ones(16, 16).to(kind) for _ in range(2))
            if kind is torch.float8_e4m3fn:
                with pytest.raises(RehearsalRefused, match="e4m3fnuz"):
                    getattr(torch.ops.aten, operator)(a, b.t(), one, one, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("character", ["\x1c", "\x1d", "\x1e", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\r"])
def test_a_row_of_json_has_what_its_strings_have(tmp_path: Path, character: str):
    """datalad/datalad 3523, securisec/ripgrepy 34, hegeldev/hegel-core 25, BrianPugh/cyclopts 902."""
    path, text = tmp_path / "rows.jsonl", f"one{character}two"
    row = json.dumps({"prompt": text, "answer": text}, ensure_ascii=False)
    if character >= " ":
        assert character in row
    path.write_bytes(f"{row}\n{row}\n".encode())
    assert [(one.prompt, one.answer) for one in jsonl.read_file(path).problems] == [(text, text)] * 2
    path.write_bytes(f"{row}\n{row[:-1]}\n".encode())
    with pytest.raises(IsthmusError, match=r"rows\.jsonl:2: "):
        jsonl.read_file(path)


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_a_stream_of_events_goes_on_behind_a_separator_in_a_text(hermes: Served, character: str):
    """modaic-ai/modaic 188: a line of JSON was cut where httpx, as `str.splitlines`, sees an end."""
    text = f"one{character}two"
    stream = hermes.chat(f"</think>{text}", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == text


@pytest.mark.parametrize(
    ("place", "given", "expected"),
    [
        ("boxed", r"\boxed{9{,}500}", "9500"),
        ("boxed", r"\boxed{$9{,}500}", "9500"),
        ("boxed", r"\boxed{\$9{,}500}", "9500"),
        ("boxed", r"\boxed{8,000}", "8000"),
        ("boxed", r"\boxed{\frac{1}{2}}", "0.5"),
        ("boxed", r"\boxed{-2\dfrac{1}{3}}", "-7/3"),
        ("whole", "$29.00", "29"),
        ("whole", r"\$29.00", "29"),
        ("whole", r"50\%", "0.5"),
        ("whole", r"1.5\times10^{3}", "1500"),
        ("whole", r"\(12\,500\)", "12500"),
        ("whole", "$42$", "42"),
        ("hashes", "so it is\n#### 1,234", "#### 1234"),
    ],
)
def test_numbers_count_as_answers_of_models_have_them(place, given: str, expected: str):
    """open-compass/opencompass 2647 and 2426, EleutherAI/lm-evaluation-harness 3214, greynewell/matchspec 306."""
    task = jsonl.JsonlTask([], [], place)
    assert task.accuracy(Problem("x", "x", expected), completion_text("", given)) == 1.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (r"9{,}500", "500"),
        (r"\frac{1}{2}", "12"),
        (r"\frac{1}{0}", "1"),
        ("$4$2$", "42"),
        (r"1{,}2", "12"),
        ("{}", "0"),
    ],
)
def test_latex_makes_no_number_of_another_one(given: str, expected: str):
    task = jsonl.JsonlTask([], [], "whole")
    assert task.accuracy(Problem("x", "x", expected), completion_text("", given)) == 0.0


def test_fields_of_a_message_that_clients_add_and_limits_by_their_new_name_are_taken(hermes: Served):
    """vllm-project/vllm 10463 (CodeCompanion sends `id` and `opts`), voideditor/void 128, earendil-works/pi 7938."""
    turns = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "Weather?", "id": 1947269257, "opts": {"visible": False}},
        {"role": "assistant", "content": "Rain.", "provider_specific_fields": {"refusal": None}, "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "Why?", "cache_control": {"type": "ephemeral"}}]},
    ]
    tools = [{**TOOLS[0], "cache_control": {"type": "ephemeral"}}]
    answer = hermes.chat("Rain, and more of it", messages=turns, tools=tools, max_completion_tokens=2)
    assert answer.choices[0].finish_reason == "length" and hermes.asked().max_new_tokens == 2
    prompt = hermes.service.tokenizer.decode(hermes.asked().prompts[0], skip_special=False)
    assert "Be short." in prompt and "Why?" in prompt
    assert not any(word in prompt for word in ("visible", "ephemeral", "refusal", "1947269257"))
    error = refused(hermes.port, "/v1/chat/completions", messages=[{**CHAT[0], "weight": 0}])
    assert "messages.0.weight" in error["message"]


def test_an_option_that_is_taken_is_honoured(hermes: Served):
    """youssofal/MTPLX 191: n, logit_bias and logprobs were taken, and one plain answer came back."""
    answer = hermes.chat("a</think>A", "b</think>B", n=2, logit_bias={"9": 5.0}, logprobs=True, messages=CHAT)
    assert [choice.message.content for choice in answer.choices] == ["A", "B"]
    assert all(choice.logprobs.content for choice in answer.choices)
    assert hermes.asked().logit_bias == {9: 5.0}
