"""The bytes that a token stands for, which may be a part of a character, read off the decoder of tokenizer.json.

Byte-level vocabularies write each byte as a character of GPT-2's alphabet; SentencePiece's write a space as U+2581 and
bytes that no piece has as `<0xNN>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer as Vocabulary

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_reader(vocabulary: Vocabulary) -> Callable[[int], bytes]:
    """A function from a token id to its bytes; those of an id that the vocabulary does not have are empty.

    Special tokens have the bytes of their text. A decoder of another kind is taken at its word for the single token.
    """
    decoders = list(_parts(json.loads(vocabulary.decoder.__getstate__()) if vocabulary.decoder else {}))
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        return lambda token: _of_alphabet(vocabulary.id_to_token(token) or "")
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        added = vocabulary.get_added_tokens_decoder()
        return lambda token: _of_pieces(vocabulary.id_to_token(token) or "", [] if token in added else decoders)
    return lambda token: vocabulary.decode([token], skip_special_tokens=False).encode()


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    elif decoder:
        yield decoder


def _of_alphabet(text: str) -> bytes:
    """A token with a character outside the alphabet is an added one, and stands for its text."""
    if all(character in _ALPHABET for character in text):
        return bytes(_ALPHABET[character] for character in text)
    return text.encode()


def _of_pieces(text: str, decoders: list[dict[str, Any]]) -> bytes:
    """Without what is done at the ends of a whole text, such as leaving out the first space."""
    for decoder in decoders:
        if decoder["type"] == "Replace":
            pattern, content = decoder["pattern"], decoder["content"]
            if "String" in pattern:
                text = text.replace(pattern["String"], content)
            else:
                text = re.sub(pattern["Regex"], content, text)
        elif decoder["type"] == "Metaspace":
            text = text.replace(decoder["replacement"], " ")
        elif decoder["type"] == "ByteFallback" and (byte := _BYTE.fullmatch(text)):
            return bytes.fromhex(byte[1])
    return text.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes are themselves, the others follow from U+0100 on (its encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()
