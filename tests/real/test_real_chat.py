"""Chats of the real model: greedy answers through the API are those of transformers, with the model's own template."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import load_service
from isthmus.formats.files.bundle import write_bundle
from tests.support.live_server import call, live
from tests.support.real_model import trained_state

pytestmark = pytest.mark.real
ANSWERS = Path(__file__).with_name("answers.jsonl")
QUESTIONS, TOKENS = 20, 12


def test_greedy_answers_are_those_of_transformers(smollm2: Path, tmp_path: Path) -> None:
    asked = [json.loads(line)["question"] for line in ANSWERS.read_text().splitlines()[:QUESTIONS]]
    chats = [[{"role": "user", "content": question}] for question in asked]
    words = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    batch = words.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    with torch.inference_mode():
        written = theirs.generate(**batch, max_new_tokens=TOKENS, do_sample=False)[:, batch["input_ids"].shape[1] :]
    expected = words.batch_decode(written, skip_special_tokens=True)
    del theirs
    architecture, state = trained_state(smollm2)
    write_bundle(tmp_path / "b", "bf16", state, architecture, Tokenizer.load(smollm2))
    service = load_service(tmp_path / "b", slots=QUESTIONS)
    fields = {"temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
    with live(Server(service)) as port, ThreadPoolExecutor(QUESTIONS) as clients:

        def answer(chat: list[dict[str, str]]) -> dict[str, Any]:
            return call(port, "POST", "/v1/chat/completions", {"messages": chat, **fields})[1]

        answers = list(clients.map(answer, chats))
    prompts = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert [one["prompt_token_ids"] for one in answers] == prompts
    messages = [one["choices"][0]["message"] for one in answers]
    assert [one["content"] for one in messages] == expected
    assert not any(one["reasoning_content"] for one in messages), "its template does not think"
