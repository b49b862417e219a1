"""The bytes of single tokens, against llguidance's reading of the same vocabulary and the text that they make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from isthmus.data.token_bytes import bytes_reader
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.text import Rules, Vocabulary
from isthmus.engines.local.api.token_names import TextPlaces, by_name, chat_name, legacy_name, prompt_places

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
LEARNT = ["a text with words, 中文, and a face 😊 and é"] * 3


def byte_level() -> BpeTokenizer:
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<｜mark｜>"]
    bpe.train_from_iterator(
        LEARNT, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    return bpe


def sentence_piece(kind: str) -> BpeTokenizer:
    """Llama 2's layout: U+2581 for a space, one before the text, and bytes for what no piece has."""
    pieces = [
        "<unk>",
        "<end>",
        "<｜mark｜>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁atexwihords,n",
        "\n",
        "▁a",
    ]
    if kind == "bpe":
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        made = BpeTokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    else:
        made = BpeTokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<｜mark｜>", special=True)])
    return made


VOCABULARIES = {"byte-level": byte_level(), "bpe": sentence_piece("bpe"), "unigram": sentence_piece("unigram")}
THEIR_MARK = b"\xff"
"""The one byte that llguidance keeps for itself."""
KINDS = pytest.mark.parametrize("kind", list(VOCABULARIES))


@KINDS
def test_every_token_has_the_bytes_that_llguidance_reads(kind: str):
    vocabulary = VOCABULARIES[kind]
    theirs, ours = LLTokenizer(vocabulary.to_str()), bytes_reader(vocabulary)
    special = set(vocabulary.get_added_tokens_decoder()) | {vocabulary.token_to_id("<unk>")}
    size = vocabulary.get_vocab_size()
    assert size > 256
    for token in range(size):
        expected = vocabulary.id_to_token(token).encode() if token in special else theirs.decode_bytes([token])
        assert ours(token) in (expected, THEIR_MARK), vocabulary.id_to_token(token)
    assert ours(size + 5) == b""


@KINDS
@given(text=TEXT)
def test_the_bytes_of_a_text_are_those_of_its_tokens(kind: str, text: str):
    vocabulary = VOCABULARIES[kind]
    joined = b"".join(map(bytes_reader(vocabulary), vocabulary.encode(text).ids))
    expected = text if kind == "byte-level" else " " * bool(text) + text.replace("▁", " ")
    assert joined.decode() == expected


def vocabulary_of(kind: str) -> Vocabulary:
    return Vocabulary(Tokenizer(VOCABULARIES[kind], "{{ messages }}", None, "<end>"))


@KINDS
@given(text=TEXT.filter(lambda text: "▁" not in text and text))
def test_each_token_begins_at_its_character(kind: str, text: str):
    vocabulary = vocabulary_of(kind)
    tokens = VOCABULARIES[kind].encode(text).ids
    places = prompt_places(vocabulary, tokens, text)
    added = kind != "byte-level" and not text.startswith(" ")
    seen = b""
    for token, place in zip(tokens, places, strict=True):
        whole = len(seen.decode(errors="ignore"))
        assert place == min(max(whole - added, 0), len(text))
        seen += vocabulary.bytes_of(token)


def test_tokens_without_text_take_no_place():
    vocabulary = vocabulary_of("byte-level")
    encode = VOCABULARIES["byte-level"].encode
    end, mark = encode("<end>").ids[0], encode("<｜mark｜>").ids[0]
    tokens = [*encode("é").ids, mark, *encode("x").ids, end]
    two = len(encode("é").ids)
    assert TextPlaces(vocabulary, Rules(), start=5).of(tokens) == [5] * two + [6, 6, 7]
    assert TextPlaces(vocabulary, Rules(skip_special=False)).of(tokens)[two:] == [
        1,
        1 + len("<｜mark｜>"),
        2 + len("<｜mark｜>"),
    ]
    assert prompt_places(vocabulary, [mark, *encode("xy").ids], "xy")[:2] == [0, 0]


def test_tokens_of_a_character_are_named_by_their_bytes_and_never_share_a_name():
    vocabulary = vocabulary_of("bpe")
    name = VOCABULARIES["bpe"].token_to_id
    half, other, byte, piece = name("<0xF0>"), name("<0x9F>"), name("<0x0A>"), name("\n")
    assert (chat_name(vocabulary, half), legacy_name(vocabulary, half)) == ("\\xf0", "bytes:\\xf0")
    assert chat_name(vocabulary, byte) == chat_name(vocabulary, piece) == "\n"
    top = [(half, -1.0), (other, -2.0), (byte, -3.0), (piece, -4.0)]
    found = by_name(vocabulary, piece, top)
    assert found == {"bytes:\\xf0": -1.0, "bytes:\\x9f": -2.0, f"token_id:{byte}": -3.0, "\n": -4.0}
    assert list(by_name(vocabulary, half, top)) == ["bytes:\\xf0", "bytes:\\x9f", "\n", f"token_id:{piece}"]
    unknown = [(len(VOCABULARIES["bpe"].get_vocab()) + extra, -float(extra)) for extra in (1, 2, 3)]
    assert len(by_name(vocabulary, half, unknown)) == 3
