"""A byte-level BPE tokenizer with DeepSeek-R1's special tokens and chat template, stored in Hugging Face layout.

Numbers up to three digits are one token, with or without a space before them, when the training text holds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from isthmus.errors import IsthmusError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT, THINK, END_THINK]
_WORDS = r" ?[✗✓]\n?| ?\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s+"

# DeepSeek-R1's template: earlier thinking is cut from the history, and a new turn opens inside <think>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<｜Assistant｜>"
    "{{ message['content'].split('</think>')[-1].lstrip() }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


class Tokenizer:
    """Text to token ids and back, and conversations to prompts."""

    def __init__(self, bpe: BpeTokenizer, chat_template: str = CHAT_TEMPLATE, bos: str = BOS, eos: str = EOS):
        self._bpe = bpe
        self.chat_template = chat_template
        self.bos, self.eos = bos, eos
        self.bos_id, self.eos_id = self._special(bos), self._special(eos)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        self._template = environment.from_string(chat_template)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn at most `vocab_size` tokens from texts. The result depends on the texts alone."""
        bpe = BpeTokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and tokenizer_config.json from a checkpoint or bundle folder."""
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            bpe = BpeTokenizer.from_file(str(folder / "tokenizer.json"))
        except FileNotFoundError as error:
            raise IsthmusError(f"{folder} has no tokenizer: {Path(str(error.filename)).name} is missing") from None
        except json.JSONDecodeError as error:
            raise IsthmusError(f"{folder / 'tokenizer_config.json'} is not valid JSON: {error}") from None
        bos, eos = (_content(config.get(key)) for key in ("bos_token", "eos_token"))
        return cls(bpe, config.get("chat_template", CHAT_TEMPLATE), bos or BOS, eos or EOS)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers and vLLM read them."""
        self._bpe.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config(), indent=2), encoding="utf-8")

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }

    @property
    def vocab_size(self) -> int:
        return self._bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it become their ids."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of token ids. With `skip_special` the special tokens are left out, but never </think>."""
        if skip_special:
            hidden = {self._bpe.token_to_id(token) for token in (self.bos, self.eos, USER, ASSISTANT)}
            ids = [token for token in ids if token not in hidden]
        return self._bpe.decode(ids, skip_special_tokens=False)

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Prompt ids of a conversation; the prompt ends inside <think>."""
        try:
            text = self._template.render(
                messages=messages, bos_token=self.bos, eos_token=self.eos, add_generation_prompt=True
            )
        except TemplateError as error:
            raise IsthmusError(f"the chat template refuses this conversation: {error}") from None
        return self.encode(text)

    def _special(self, token: str) -> int:
        number = self._bpe.token_to_id(token)
        if number is None:
            raise IsthmusError(f"the tokenizer has no token {token!r}")
        return number


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
