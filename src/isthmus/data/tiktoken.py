"""Vocabularies of tiktoken's kind (Kimi K2, Qwen 1, GLM-4): tokens with ranks in a file, the rest in code beside it.

The code is read, never run: what is needed of it is the pattern that cuts a text into words, which stands there as a
literal. https://github.com/openai/tiktoken: pairs are joined by the rank of what they make, lowest first.
"""

from __future__ import annotations

import ast
import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.lines import read_text

VOCABULARIES = ("tiktoken.model", "*.tiktoken", "tokenizer.model")
_PATTERN_NAME = re.compile(r"_?pat(tern)?(_?str)?$", re.IGNORECASE)


def find_tiktoken(folder: Path) -> Path | None:
    """The vocabulary of this kind in a folder, if there is one. A SentencePiece model may have the same name."""
    found = (path for pattern in VOCABULARIES for path in sorted(folder.glob(pattern)))
    return next((path for path in found if path.is_file() and _is_text(path)), None)


def read_tiktoken(path: Path, config: dict[str, Any]) -> Tokenizer:
    """The same vocabulary for the tokenizers library, with the special tokens of tokenizer_config.json at their ids.

    Raises DamagedFile if the file cannot be read, IsthmusError if no code beside it has the pattern as a literal.
    """
    ranks = _read_ranks(path)
    written = _alphabet()

    def shown(token: bytes) -> str:
        return "".join(written[byte] for byte in token)

    merges = [(shown(left), shown(right)) for left, right in _merges(ranks)]
    vocabulary = {shown(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pattern(path.parent)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _reserve(tokenizer, len(ranks), config)
    return tokenizer


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.readline(256)) is not None


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DamagedFile(f"{path}:{number} is no token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DamagedFile(f"{path}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, by the rank of that, then by their own."""
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _alphabet() -> dict[int, str]:
    """A printable character for each byte, as byte-level vocabularies of the tokenizers library have them (GPT-2's)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _reserve(tokenizer: Tokenizer, first: int, config: dict[str, Any]) -> None:
    """Special tokens behind the vocabulary. An id that none has gets a name of its own, as Kimi's code gives it."""
    listed = {int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()}
    for number in range(first, max(listed, default=-1) + 1):
        token = listed.get(number) or {"content": f"<|reserved_token_{number}|>", "special": True}
        tokenizer.add_tokens([AddedToken(**{key: value for key, value in token.items() if key != "__type"})])


def _pattern(folder: Path) -> str:
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(read_text(path))
        except (SyntaxError, ValueError, RecursionError, MemoryError, IsthmusError):
            continue
        if (found := _literal_pattern(tree)) is not None:
            return found
    raise IsthmusError(
        f"{folder} has a vocabulary of tiktoken's kind, and no code beside it has the pattern of its words as a "
        "literal: put a tokenizer.json there, as transformers saves it with trust_remote_code"
    )


def _literal_pattern(tree: ast.Module) -> str | None:
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        text = _text_of(value, known)
        for target in targets:
            name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")
            if text is not None:
                known[name] = text
                if _PATTERN_NAME.search(name):
                    return text
    return None


def _text_of(node: ast.expr, known: dict[str, str]) -> str | None:
    """The text that an expression of literals is: one, a sum, or a list that is joined."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [_text_of(node.left, known), _text_of(node.right, known)]
        return _joined("", sides)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        separator = _text_of(node.func.value, known)
        parts = node.args[0] if node.args else None
        if separator is not None and isinstance(parts, ast.List | ast.Tuple):
            return _joined(separator, [_text_of(part, known) for part in parts.elts])
    return None


def _joined(separator: str, parts: list[str | None]) -> str | None:
    texts = [part for part in parts if part is not None]
    return separator.join(texts) if len(texts) == len(parts) else None
