"""A byte-level BPE tokenizer with DeepSeek-R1's special tokens and chat template, stored in Hugging Face layout.

Numbers up to three digits are one token, with or without a space before them, when the training text holds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from isthmus.data.token_bytes import bytes_reader
from isthmus.errors import IsthmusError
from isthmus.lines import read_text

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT, THINK, END_THINK]
_TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
_KEPT = ("pad_token", "unk_token", "model_max_length")
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
    """Text to token ids and back, and conversations to prompts.

    `template_variables` are what the chat template can be given. `thinks` says whether the model was taught to: its
    vocabulary or its template knows <think>.
    """

    def __init__(
        self,
        bpe: BpeTokenizer,
        chat_template: str = CHAT_TEMPLATE,
        bos: str | None = BOS,
        eos: str = EOS,
        kept: dict[str, Any] | None = None,
    ):
        """`kept` are further keys for tokenizer_config.json."""
        self._bpe, self._kept = bpe, kept or {}
        self.chat_template = chat_template
        self.bos, self.eos = bos, eos
        self.bos_id, self.eos_id = None if bos is None else self._special(bos), self._special(eos)
        self._template, self.template_variables = _compile(chat_template)
        self._hidden = self._hidden_ids()
        self.thinks = THINK in chat_template or bpe.token_to_id(THINK) is not None

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
        """Read the tokenizer of a checkpoint or bundle folder, with its special tokens and chat template.

        The template is chat_template.jinja or that of tokenizer_config.json. The special tokens are those of
        tokenizer_config.json, special_tokens_map.json or config.json, whichever names them first. Raises IsthmusError
        saying what is missing.
        """
        config = _read_json(folder / "tokenizer_config.json", needed=True)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise IsthmusError(f"{folder} has no tokenizer: {path.name} is missing")
        bpe = BpeTokenizer.from_file(str(path))
        bos, eos = (_special_token(folder, config, bpe, key) for key in ("bos", "eos"))
        if eos is None:
            raise IsthmusError(f"{folder} names no eos_token: write it into tokenizer_config.json")
        kept = {key: config[key] for key in _KEPT if key in config}
        return cls(bpe, _chat_template(folder, config, bpe), bos, eos, kept)

    def taught_to_think(self) -> Tokenizer:
        """The same for a model that is to learn it: prompts end inside <think>, by the chat template itself."""
        if self.thinks:
            return self
        opening = "{% if add_generation_prompt %}" + THINK + "\n{% endif %}"
        return Tokenizer(self._bpe, self.chat_template + opening, self.bos, self.eos, self._kept)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers and vLLM read them."""
        self._bpe.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config(), indent=2), encoding="utf-8")

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        return {
            **self._kept,
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

    @cached_property
    def longest_token(self) -> int:
        """An upper bound of the characters in one token."""
        return max(map(len, self._bpe.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it become their ids."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool = True, shown: frozenset[int] = frozenset()) -> str:
        """Text of token ids. `skip_special` leaves special tokens out, but never <think>, </think> and `shown`."""
        if skip_special:
            hidden = self._hidden - shown if shown else self._hidden
            ids = [token for token in ids if token not in hidden]
        return self._bpe.decode(ids, skip_special_tokens=False)

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """Prompt ids of a conversation, as `chat_text` renders it."""
        return self.encode(self.chat_text(messages, tools, **variables))

    def chat_text(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **variables: Any
    ) -> str:
        """The prompt of a conversation. Of a model that thinks it ends inside <think>, whatever the template says.

        Where the template closes the thinking, it ends after </think>. `tools` are functions in OpenAI's layout;
        `variables` are further ones of the template. Raises IsthmusError if the template refuses.
        """
        text = self._render(messages, tools, variables)
        decided = not self.thinks or text.rstrip().endswith((THINK, END_THINK))
        return text if decided else f"{text}{THINK}\n"

    @cached_property
    def bytes_of(self) -> Callable[[int], bytes]:
        """The bytes that a token stands for, which may be a part of a character."""
        return bytes_reader(self._bpe)

    def is_structure(self, token: int) -> bool:
        """Whether a token structures a conversation and is no part of its text."""
        return token in self._hidden

    def serialise(self) -> str:
        """The content of tokenizer.json."""
        return self._bpe.to_str()

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        """Templates want the arguments of calls as objects, or as text that they append to other text."""
        given = {
            **variables,
            "bos_token": self.bos or "",
            "eos_token": self.eos,
            "tools": tools,
            "add_generation_prompt": True,
        }
        try:
            try:
                return self._template.render(messages=messages, **given)
            except TypeError:
                return self._template.render(messages=_with_text_arguments(messages), **given)
        except _TEMPLATE_FAILURES as error:
            raise IsthmusError(f"the chat template refuses this conversation: {error}") from None

    def _special(self, token: str) -> int:
        number = self._bpe.token_to_id(token)
        if number is None:
            raise IsthmusError(f"the tokenizer has no token {token!r}")
        return number

    def _hidden_ids(self) -> set[int]:
        """Tokens that structure a conversation and are no part of its text."""
        added = self._bpe.get_added_tokens_decoder()
        special = {
            number for number, token in added.items() if token.special and token.content not in (THINK, END_THINK)
        }
        named = {self._bpe.token_to_id(token) for token in (self.bos, self.eos, USER, ASSISTANT) if token is not None}
        return special | {number for number in named if number is not None}


def _compile(chat_template: str) -> tuple[Template, frozenset[str]]:
    """The template in a sandbox, with what published templates use, as in transformers; and its variables."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _raise_template_error, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    try:
        variables = meta.find_undeclared_variables(environment.parse(chat_template)) - environment.globals.keys()
        return environment.from_string(chat_template), frozenset(variables)
    except TemplateError as error:
        raise IsthmusError(f"the chat template cannot be read: {error}") from None


def _with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation, with the arguments of each call as JSON text."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes HTML characters."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _chat_template(folder: Path, config: dict[str, Any], bpe: BpeTokenizer) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if template is not None:
        return template
    if all(bpe.token_to_id(token) is not None for token in (USER, ASSISTANT)):
        return CHAT_TEMPLATE
    raise IsthmusError(f"{folder} has no chat template: write one into {path.name}")


def _special_token(folder: Path, config: dict[str, Any], bpe: BpeTokenizer, key: str) -> str | None:
    """The text of the bos or eos token."""
    for source in (config, _read_json(folder / "special_tokens_map.json")):
        token = source.get(f"{key}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None:
            return text
    number = _read_json(folder / "config.json").get(f"{key}_token_id")
    if isinstance(number, list):
        number = number[0]
    return None if number is None or f"{key}_token" in config else bpe.id_to_token(number)


def _read_json(path: Path, needed: bool = False) -> dict[str, Any]:
    """The content of a file; of a file that need not be there, nothing."""
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        if needed:
            raise IsthmusError(f"{path.parent} has no tokenizer: {path.name} is missing") from None
        return {}
    except json.JSONDecodeError as error:
        raise IsthmusError(f"{path} is not valid JSON: {error}") from None
