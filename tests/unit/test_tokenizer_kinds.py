"""Tokenizers of many kinds: text token by token, what stands before a raw text, ends, tiktoken's files."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from isthmus.data.tokenizer import Tokenizer, read_ends
from isthmus.engines.local.api.text import ChannelledText, CharacterStream, PlainText, Rules, Vocabulary
from isthmus.errors import DamagedFile, IsthmusError
from tests.unit.test_published_tokenizer import CONVERSATION, R1_DISTILL

TEXTS = ["The quick brown fox jumps over the lazy dog, and 3 + 4 = 7. naïve café", "  two  spaces   and\n\ta tab"] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARKS = ["<unk>", "<s>", "</s>"]


def llama2() -> BpeTokenizer:
    """As converted from Llama 2's SentencePiece model: the space of the first word is put there and taken away."""
    bpe = BpeTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=[*MARKS, *BYTES]))
    return bpe


def metaspace() -> BpeTokenizer:
    """As of T5, XGLM and newer conversions."""
    bpe = BpeTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=[*MARKS, *BYTES]))
    return bpe


def unigram() -> BpeTokenizer:
    bpe = BpeTokenizer(models.Unigram())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bpe.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=90, special_tokens=MARKS, unk_token="<unk>"))
    return bpe


def wordpiece() -> BpeTokenizer:
    bpe = BpeTokenizer(models.WordPiece(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    bpe.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=MARKS))
    return bpe


def byte_level() -> BpeTokenizer:
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=MARKS, initial_alphabet=alphabet))
    return bpe


KINDS = {make.__name__: make() for make in (llama2, metaspace, unigram, wordpiece, byte_level)}
OURS = {name: Tokenizer(bpe, R1_DISTILL, "<s>", "</s>") for name, bpe in KINDS.items()}


def streamed(tokenizer: Tokenizer, tokens: list[int], before: list[int] | None = None) -> str:
    stream = CharacterStream(tokenizer, Rules(), before or [])
    return "".join(map(stream.push, tokens)) + stream.flush()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", ["Hello there, it is 7 €. 🙂 naïve", "  two  spaces", "a", "fox\n\n\tdog  "])
def test_a_stream_has_the_text_that_its_tokens_have_together(name: str, text: str):
    """huggingface/tokenizers 1141, InfiniLM 398, sentencepiece 1043: the words came without spaces."""
    tokenizer, tokens = OURS[name], OURS[name].encode(text)
    whole = tokenizer.decode(tokens)
    theirs = DecodeStream(skip_special_tokens=True)
    stepped = "".join(part for token in tokens if (part := theirs.step(KINDS[name], token)))
    assert streamed(tokenizer, tokens) == whole and whole.startswith(stepped)
    chat = ChannelledText(Vocabulary(tokenizer), Rules(), "without")
    deltas = [delta for token in tokens for delta in chat.push(token)] + chat.finish()
    assert "".join(delta.text for delta in deltas) == whole


@pytest.mark.parametrize("name", KINDS)
def test_a_completion_is_what_follows_the_text_of_its_prompt(name: str):
    tokenizer = OURS[name]
    tokens = tokenizer.encode("The quick brown fox jumps over")
    for cut in range(len(tokens) + 1):
        prompt, rest = tokens[:cut], tokens[cut:]
        expected = tokenizer.decode(tokens).removeprefix(tokenizer.decode(prompt))
        writers = [PlainText(Vocabulary(tokenizer), Rules(), prompt) for _ in range(2)]
        one_by_one = [delta for token in rest for delta in writers[0].push(token)] + writers[0].finish()
        at_once = writers[1].push_all(rest) + writers[1].finish()
        assert "".join(delta.text for delta in one_by_one) == "".join(delta.text for delta in at_once) == expected


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(KINDS)), st.lists(st.integers(0, 89), max_size=30), st.lists(st.integers(3, 89), max_size=5)
)
def test_any_tokens_stream_without_an_error_and_lose_no_later_text(name: str, tokens: list[int], before: list[int]):
    """Bytes that make no character raise in the library's own stream: "Invalid prefix encountered"."""
    tokenizer = OURS[name]
    last = tokenizer.encode("dog")
    assert streamed(tokenizer, [*tokens, *last], before).endswith("dog")


@pytest.mark.parametrize(
    ("processor", "kept", "added"),
    [
        (processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]), {}, True),
        (processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]), {"add_bos_token": False}, True),
        (None, {"add_bos_token": False}, False),
        (None, {}, False),
    ],
    ids=["Llama 3", "as saved by us", "Qwen2.5", "nothing said"],
)
def test_a_raw_text_has_the_beginning_that_transformers_gives_it(tmp_path: Path, processor, kept, added: bool):
    bpe = BpeTokenizer.from_str(KINDS["byte_level"].to_str())
    if processor is not None:
        bpe.post_processor = processor
    Tokenizer(bpe, R1_DISTILL, "<s>", "</s>", kept).save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode_raw("The fox") == theirs("The fox")["input_ids"]
    assert (ours.encode_raw("The fox")[0] == ours.bos_id) == added
    assert ours.encode_raw("<s>The fox").count(ours.bos_id) == 1, "a rendered conversation has one already"
    assert ours.chat(CONVERSATION) == theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]
    assert ours.chat(CONVERSATION).count(ours.bos_id) == 1


def test_a_configuration_alone_may_ask_for_the_beginning(tmp_path: Path):
    """DeepSeek V3: add_bos_token, and a tokenizer.json that adds nothing."""
    Tokenizer(KINDS["byte_level"], R1_DISTILL, "<s>", "</s>", {"add_bos_token": True}).save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.encode_raw("The fox") == [1, *ours.encode("The fox")] and ours.config()["add_bos_token"]


def test_tokens_that_the_configuration_adds_are_added(tmp_path: Path):
    Tokenizer(KINDS["byte_level"], R1_DISTILL, "<s>", "</s>").save(tmp_path)
    path, size = tmp_path / "tokenizer_config.json", KINDS["byte_level"].get_vocab_size()
    config = json.loads(path.read_text())
    tokens = [{"content": text, "special": text == "<a>", "lstrip": False} for text in ("<a>", "<b>")]
    path.write_text(json.dumps({**config, "added_tokens_decoder": {str(size): tokens[0], str(size + 1): tokens[1]}}))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("x<a><b>")[1:] == theirs("x<a><b>")["input_ids"][1:] == [size, size + 1]
    assert ours.decode([size, size + 1]) == "<b>"
    path.write_text(json.dumps({**config, "added_tokens_decoder": {str(size + 5): tokens[0]}}))
    with pytest.raises(IsthmusError, match=f"the id {size + 5}"):
        Tokenizer.load(tmp_path)


def test_a_limit_that_a_tokenizer_was_saved_with_cuts_no_prompt(tmp_path: Path):
    Tokenizer(KINDS["byte_level"], R1_DISTILL, "<s>", "</s>").save(tmp_path)
    limited = BpeTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    limited.enable_truncation(3)
    limited.enable_padding(length=9)
    limited.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("The quick brown fox jumps over")) == len(
        OURS["byte_level"].encode("The quick brown fox jumps over")
    )


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ([1, 106], 1, (1, 106)),
        (2, [2, 128131], (2, 128131)),
        ([151645, 151643], 151645, (151645, 151643)),
        (None, 7, (7,)),
        (7, None, (7,)),
        (None, None, ()),
    ],
    ids=["Gemma 3", "InternLM3 the other way", "Qwen3", "config alone", "generation alone", "none"],
)
def test_every_end_of_either_file_is_one(tmp_path: Path, generation, config, ends):
    """mlx-vlm 309 and 2112, InfiniLM 386, vllm 5954: one file was read, or one id of it."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert read_ends(tmp_path) == ends


def test_the_tokenizers_own_end_is_one_and_ends_survive_a_bundle(tmp_path: Path):
    """mlx-vlm 2112: generation_config.json lists <|endoftext|> alone, and turns end with the tokenizer's <|im_end|>."""
    OURS["byte_level"].save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5]}))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 8}}))
    assert Tokenizer.load(tmp_path).ends == (2, 5, 8, 9)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ["a"]}))
    with pytest.raises(IsthmusError, match="eos_token_id must be a token id"):
        Tokenizer.load(tmp_path)


# tiktoken

PATTERN = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
CODE = '''
from nowhere import Anything
VOCAB_FILES_NAMES = {"vocab_file": "tiktoken.model"}
raise RuntimeError("this code is read, and never run")
class TikTokenTokenizer(Anything):
    pat_str = "|".join([
        r"""[\\p{Han}]+""",
        r"""[^\\r\\n\\p{L}\\p{N}]?[\\p{L}&&[^\\p{Han}]]+""",
        r"""\\p{N}{1,3}""" + "|" + r""" ?[^\\s\\p{L}\\p{N}]+""",
        r"""\\s+""",
    ])
'''
SPECIAL = {"BOS": 0, "EOS": 1, "<|im_end|>": 4}


def byte_ranks() -> dict[bytes, int]:
    """A vocabulary learnt by the tokenizers library, as bytes by rank."""
    letters = {letter: byte for byte, letter in enumerate_bytes()}
    vocabulary = BpeTokenizer.from_str(KINDS["byte_level"].to_str()).get_vocab()
    ordered = sorted((number, text) for text, number in vocabulary.items() if text not in MARKS)
    return {bytes(letters[letter] for letter in text): rank for rank, (_, text) in enumerate(ordered)}


def enumerate_bytes() -> list[tuple[int, str]]:
    """Each byte with its letter in byte-level vocabularies, asked of the library itself."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found: dict[int, str] = {}
    for text in (
        [chr(code) for code in range(0x80)] + [chr(code) for code in range(0x80, 0x800, 0x3F)] + ["€", "中", "🙂"]
    ):
        shown = "".join(part for part, _ in pre.pre_tokenize_str(text))
        found |= dict(zip(text.encode(), shown, strict=True))
    others = iter(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(found.values())))
    return [(byte, found.get(byte) or next(others)) for byte in range(256)]


def write_tiktoken(folder: Path, code: str = CODE, name: str = "tiktoken.model") -> dict[bytes, int]:
    ranks = byte_ranks()
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / name).write_bytes(b"".join(lines))
    (folder / "tokenization_kimi.py").write_text(code)
    decoder = {str(len(ranks) + at): {"content": text, "special": True} for text, at in SPECIAL.items()}
    config = {"bos_token": "BOS", "eos_token": "EOS", "added_tokens_decoder": decoder, "chat_template": R1_DISTILL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ranks


def by_ranks(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's way, slowly: of all neighbours join those that make the token of the lowest rank."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        joins = [(ranks[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joins:
            return [ranks[part] for part in parts]
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("name", ["tiktoken.model", "qwen.tiktoken", "tokenizer.model"])
def test_a_vocabulary_of_tiktokens_kind_is_read_without_running_its_code(tmp_path: Path, name: str):
    """llama.cpp 26193, omlx 3733: Kimi's vocabulary stands in tiktoken.model, and the rest in code beside it."""
    ranks = write_tiktoken(tmp_path, name=name)
    ours = Tokenizer.load(tmp_path)
    words = BpeTokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    for text in (*TEXTS, "12345 中文 naïve 🙂\n\n", "quickquick Fox"):
        pieces = [piece for piece, _ in words.pre_tokenizer.pre_tokenize_str(text)]
        assert ours.encode(text) == [token for piece in pieces for token in by_ranks(piece.encode(), ranks)]
        assert ours.decode(ours.encode(text)) == text
    size = len(ranks)
    assert ours.encode("BOSa<|im_end|>") == [size, ranks[b"a"], size + 4] and (ours.bos_id, ours.eos_id) == (
        size,
        size + 1,
    )
    assert ours.decode([size + 2], skip_special=False) == f"<|reserved_token_{size + 2}|>"
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs("The fox, 7 中")["input_ids"] == ours.encode("The fox, 7 中")


def test_what_cannot_be_read_of_such_a_vocabulary_is_said(tmp_path: Path):
    write_tiktoken(tmp_path, code="def pattern(): return compute()")
    with pytest.raises(IsthmusError, match="no code beside it has the pattern"):
        Tokenizer.load(tmp_path)
    write_tiktoken(tmp_path)
    whole = (tmp_path / "tiktoken.model").read_bytes()
    (tmp_path / "tiktoken.model").write_bytes(whole + b"!!! 9\n")
    with pytest.raises(DamagedFile, match=r"tiktoken\.model:\d+ is no token"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(whole.partition(b"\n")[2])
    with pytest.raises(DamagedFile, match="the ranks"):
        Tokenizer.load(tmp_path)
