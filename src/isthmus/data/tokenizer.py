"""A byte-level BPE tokenizer with DeepSeek-R1's special tokens and chat template, stored in Hugging Face layout.

Numbers up to three digits are one token, with or without a space before them, when the training text holds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from isthmus.data.chat_template import END_THINK, THINK, ChatTemplate
from isthmus.data.tiktoken import find_tiktoken, read_tiktoken
from isthmus.data.token_bytes import bytes_reader
from isthmus.errors import IsthmusError
from isthmus.lines import read_json_object, read_text

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT, THINK, END_THINK]
DEFAULT, TOOL_USE = "default", "tool_use"
"""The names of templates, where a checkpoint has several: https://huggingface.co/docs/transformers/chat_templating"""
CHAT_FILE, CHAT_FOLDER = "chat_template.jinja", "additional_chat_templates"
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEPT = (*(f"{name}_token" for name in _NAMED[2:]), "add_bos_token", "model_max_length")
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

    `ends` are the tokens that end an answer: the end token, and what generation_config.json and config.json list beside
    it. `template` is the chat template, `tool_template` the one for conversations with tools.
    """

    def __init__(
        self,
        bpe: BpeTokenizer,
        chat_template: str | dict[str, str] = CHAT_TEMPLATE,
        bos: str | None = BOS,
        eos: str = EOS,
        kept: dict[str, Any] | None = None,
        other_ends: Iterable[int] = (),
    ):
        """`chat_template` may be several by name, a default one among them. `kept` are further keys for
        tokenizer_config.json."""
        self._bpe, self._kept = bpe, kept or {}
        self._templates = {DEFAULT: chat_template} if isinstance(chat_template, str) else chat_template
        self.template = ChatTemplate(self._templates[DEFAULT])
        self.tool_template = ChatTemplate(self._templates[TOOL_USE]) if TOOL_USE in self._templates else self.template
        self.bos, self.eos = bos, eos
        self.bos_id, self.eos_id = None if bos is None else self._special(bos), self._special(eos)
        self.ends = (self.eos_id, *sorted(set(other_ends) - {self.eos_id}))
        self._hidden = self._hidden_ids()

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
        """Read the tokenizer of a checkpoint or bundle folder, with its special tokens, ends and chat template.

        The template is chat_template.jinja or that of tokenizer_config.json. The special tokens are those of
        tokenizer_config.json, special_tokens_map.json or config.json, whichever names them first. Tokens that
        tokenizer_config.json adds to the vocabulary are added, as transformers adds them. Raises IsthmusError saying
        what is missing.
        """
        config = _read_json(folder / "tokenizer_config.json", needed=True)
        try:
            return cls._of(folder, config, _read_vocabulary(folder, config))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise IsthmusError(
                f"{folder / 'tokenizer_config.json'}, or what is beside it about special tokens and templates, has "
                f"another form than transformers writes ({error!r}); copy the folder again"
            ) from None

    @classmethod
    def _of(cls, folder: Path, config: dict[str, Any], bpe: BpeTokenizer) -> Tokenizer:
        _add_tokens(bpe, config, folder / "tokenizer_config.json")
        bos, eos = (_special_token(folder, config, bpe, key) for key in ("bos", "eos"))
        if eos is None:
            raise IsthmusError(f"{folder} names no eos_token: write it into tokenizer_config.json")
        named = _read_json(folder / "special_tokens_map.json") | config
        kept = {key: named[key] for key in _KEPT if key in named}
        templates, ends = _chat_templates(folder, config, bpe), read_ends(folder)
        try:
            return cls(bpe, templates, bos, eos, kept, ends)
        except IsthmusError as error:
            raise IsthmusError(f"{folder}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers and vLLM read them."""
        self._bpe.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config(), indent=2), encoding="utf-8")

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        several = [{"name": name, "template": source} for name, source in self._templates.items()]
        return {
            "add_bos_token": False,
            **self._kept,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
            "chat_template": self._templates[DEFAULT] if len(several) == 1 else several,
        }

    @property
    def chat_template(self) -> str:
        """The source of the template."""
        return self.template.source

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

    def encode_raw(self, text: str) -> list[int]:
        """The same with what the tokenizer puts around a raw text: a token for the beginning, of most that have one.

        Its post-processor says so, or add_bos_token of tokenizer_config.json. A text that has it already keeps one.
        """
        ids = self._bpe.encode(text, add_special_tokens=True).ids
        if self.bos_id is None:
            return ids
        if ids[:2] == [self.bos_id, self.bos_id]:
            return ids[1:]
        wanted = self._kept.get("add_bos_token") is True and ids[:1] != [self.bos_id]
        return [self.bos_id, *ids] if wanted else ids

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
        """The prompt of a conversation, as the template has it and transformers renders it.

        `tools` are functions in OpenAI's layout; `variables` are further ones of the template, and may take the place
        of add_generation_prompt. Raises IsthmusError if the template refuses.
        """
        template = self.template if tools is None else self.tool_template
        given = {"add_generation_prompt": True, "documents": None, **self.special_tokens, **variables}
        return template.render(messages, tools=tools, **given)

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the template lets an answer begin inside <think>."""
        return leaves_thinking_open(self._opening)

    @cached_property
    def thinks(self) -> bool:
        """Whether a model is to think by its template: that opens the thinking, or leaves it to the model to open."""
        if self.opens_thinking or not self.template.opens_by_mark:
            return self.opens_thinking
        return not self._opening.rstrip().endswith(END_THINK)

    @cached_property
    def _opening(self) -> str:
        """The prompt of a conversation of one turn; nothing, of a template that refuses it."""
        try:
            return self.chat_text([{"role": "user", "content": "?"}])
        except IsthmusError:
            return ""

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens that there are, by the names that templates know them by."""
        named = {f"{name}_token": _text_of(self._kept.get(f"{name}_token")) for name in _NAMED[2:]}
        found = {"bos_token": self.bos, "eos_token": self.eos, **named}
        return {name: text for name, text in found.items() if text is not None}

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character."""
        return self._read_bytes(token)

    @cached_property
    def _read_bytes(self) -> Callable[[int], bytes]:
        return bytes_reader(self._bpe)

    def is_structure(self, token: int) -> bool:
        """Whether a token structures a conversation and is no part of its text."""
        return token in self._hidden

    def serialise(self) -> str:
        """The content of tokenizer.json."""
        return self._bpe.to_str()

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


def leaves_thinking_open(prompt: str) -> bool:
    """Whether the answer to a prompt begins inside <think>."""
    return prompt.rstrip().endswith(THINK)


def read_ends(folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer, as generation_config.json and config.json have them: one, a list, or none each."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        for source in (config, config.get("text_config") or {}):
            listed = source.get("eos_token_id") if isinstance(source, dict) else None
            ends = [] if listed is None else listed if isinstance(listed, list) else [listed]
            if wrong := [one for one in ends if type(one) is not int]:
                text = f"eos_token_id must be a token id or a list of them, and holds {wrong[0]!r}"
                raise IsthmusError(f"{folder / name}: {text}")
            found |= dict.fromkeys(ends)
    return tuple(found)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file of a tokenizer, of any kind."""
    names = (
        "tokenizer*",
        "tokenization_*.py",
        "*.tiktoken",
        "tiktoken.model",
        "tekken.json",
        "spiece.model",
        "vocab.*",
    )
    return any(path.is_file() for name in names for path in folder.glob(name))


def _read_vocabulary(folder: Path, config: dict[str, Any]) -> BpeTokenizer:
    """A vocabulary that encodes texts of any length, whatever limit the file was saved with."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (other := find_tiktoken(folder)) is not None:
            return read_tiktoken(other, config)
        raise IsthmusError(f"{folder} has no tokenizer: {path.name} is missing")
    try:
        bpe = BpeTokenizer.from_file(str(path))
    except BaseException as error:
        # The library raises nothing more specific, and where it panics, what is no Exception.
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise IsthmusError(f"{path} cannot be read by the tokenizers library: {error}; copy it again") from None
        raise
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def _add_tokens(bpe: BpeTokenizer, config: dict[str, Any], source: Path) -> None:
    """Add what `added_tokens_decoder` has and tokenizer.json does not, in the order of its ids."""
    known = {token.content for token in bpe.get_added_tokens_decoder().values()}
    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda entry: int(entry[0]))
    for number, token in listed:
        if token["content"] in known:
            continue
        bpe.add_tokens([AddedToken(**{key: value for key, value in token.items() if key != "__type"})])
        if bpe.token_to_id(token["content"]) != int(number):
            raise IsthmusError(
                f"{source} gives {token['content']!r} the id {number}, and by tokenizer.json it is "
                f"{bpe.token_to_id(token['content'])}; the two files are not of one model"
            )


def _chat_templates(folder: Path, config: dict[str, Any], bpe: BpeTokenizer) -> dict[str, str]:
    """The templates by name. Files come before tokenizer_config.json, as in transformers."""
    named = {path.stem: path for path in sorted((folder / CHAT_FOLDER).glob("*.jinja"))}
    if (folder / CHAT_FILE).is_file():
        named[DEFAULT] = folder / CHAT_FILE
    if named:
        found = {name: read_text(path) for name, path in named.items()}
    else:
        listed = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
        listed = {DEFAULT: listed} if isinstance(listed, str) else listed or {}
        found = {one["name"]: one["template"] for one in listed} if isinstance(listed, list) else listed
    if not found and all(bpe.token_to_id(token) is not None for token in (USER, ASSISTANT)):
        return {DEFAULT: CHAT_TEMPLATE}
    if not found:
        raise IsthmusError(f"{folder} has no chat template: write one into {CHAT_FILE}")
    if DEFAULT not in found:
        raise IsthmusError(f"{folder} has chat templates named {', '.join(found)}, and none named {DEFAULT}")
    return found


def _text_of(token: Any) -> str | None:
    """A special token as configurations have it: a text, or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _special_token(folder: Path, config: dict[str, Any], bpe: BpeTokenizer, key: str) -> str | None:
    """The text of the bos or eos token."""
    for source in (config, _read_json(folder / "special_tokens_map.json")):
        text = _text_of(source.get(f"{key}_token"))
        if text is not None:
            return text
    number = _read_json(folder / "config.json").get(f"{key}_token_id")
    if isinstance(number, list):
        number = number[0]
    return None if number is None or f"{key}_token" in config else bpe.id_to_token(number)


def _read_json(path: Path, needed: bool = False) -> dict[str, Any]:
    """The content of a file; of a file that need not be there, nothing."""
    try:
        return read_json_object(path)
    except FileNotFoundError:
        if needed:
            raise IsthmusError(f"{path.parent} has no tokenizer: {path.name} is missing") from None
        return {}
