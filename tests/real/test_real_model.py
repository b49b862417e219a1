"""The real model is one: it knows what it was taught, in transformers and here, token by token."""

from pathlib import Path

import pytest
import torch

from isthmus.data.tokenizer import Tokenizer
from isthmus.formats import get_format
from tests.support.real_model import trained_state

pytestmark = pytest.mark.real


def test_digits_are_tokens_of_their_own_as_in_the_published_tokenizer(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    assert tokenizer.decode([tokenizer.encode("In 1969")[-1]]) == "9"
    assert len(tokenizer.encode("1969")) == 4


def test_the_model_says_here_what_it_says_in_transformers_and_that_is_sense(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, words = (
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
        AutoTokenizer.from_pretrained(smollm2),
    )
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = words.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    answer = theirs.generate(prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in words.decode(answer[0, prompt.shape[1] :])
    ours = get_format("fp32").build(*trained_state(smollm2))
    with torch.inference_mode():
        wanted, given = (one.double().log_softmax(-1) for one in (theirs(answer).logits, ours(answer)))
    assert (wanted - given).abs().max() < 1e-3
