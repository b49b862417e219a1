"""Pretraining data against slow references in plain Python: order, documents, resumption, changed and broken files."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from isthmus.data import text_files
from isthmus.data.pretrain import Rows, TokenStream, corpus_tokenizer, permuted, round_keys, sample_texts
from isthmus.data.shards import tokenizer_sha256
from isthmus.data.text_files import cut_text
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.model.model import Model
from isthmus.trainer.batch import batch_of_rows
from tests.support.plain import document_mask
from tests.support.small import tiny_architecture

LENGTH = 8
SHARD = 2**13
"""Bytes of text in a shard of rows of LENGTH: the smallest that is made."""
WORDS = re.findall(r"\S+", "the river bends north of two hills and a ferry 12 345 crosses it, once; in March?")


def story(seed: int, words: int) -> str:
    chance = random.Random(seed)
    lines = [" ".join(chance.choices(WORDS, k=chance.randint(3, 12))) for _ in range(words // 7)]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([story(seed, 400) for seed in range(5)], 330)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Some thirty kilobytes: many small documents, in .txt and .jsonl, two folders deep, and an empty file."""
    folder = tmp_path / "corpus"
    (folder / "deep" / "er").mkdir(parents=True)
    for number in range(20):
        (folder / f"{number:02d}.txt").write_text(story(number, 40 + 20 * number), encoding="utf-8")
    lines = [json.dumps({"text": story(100 + number, 120), "source": "a"}) for number in range(9)]
    (folder / "deep" / "lines.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (folder / "deep" / "er" / "z.txt").write_text(story(7, 300), encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "README.md").write_text("not data", encoding="utf-8")
    return folder


def stream(folder: Path, tokenizer: Tokenizer, cache: Path | None = None, seed: int = 3, **options) -> TokenStream:
    cache = cache or folder.parent / "cache"
    return TokenStream(folder, tokenizer, options.pop("row_length", LENGTH), seed, cache, shard_bytes=SHARD, **options)


def documents_of(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def reference_shards(folder: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each shard, for files that are all smaller than a shard."""
    files = [path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl")]
    files = sorted(files, key=lambda path: path.relative_to(folder).as_posix())
    shards: list[list[int]] = [[]]
    sizes = [0]
    for path in files:
        if sizes[-1] >= SHARD / 2:
            shards.append([])
            sizes.append(0)
        for text in documents_of(path):
            if text:
                shards[-1] += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        sizes[-1] += path.stat().st_size
    if sizes[-1] < SHARD / 2 and len(shards) > 1:
        last = shards.pop()
        shards[-1] += last
    return shards


def reference_rows(folder: Path, tokenizer: Tokenizer) -> list[list[tuple[int, ...]]]:
    shards = reference_shards(folder, tokenizer)
    return [[tuple(shard[at : at + LENGTH]) for at in range(0, len(shard) - LENGTH + 1, LENGTH)] for shard in shards]


def as_tuples(rows: Rows) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows.tokens.tolist()]


def runs(rows: list[tuple[int, ...]], shards: list[list[tuple[int, ...]]]) -> list[int]:
    """Which shards the rows of an epoch come from, in order; each must come as a whole."""
    order, left = [], list(rows)
    unused = set(range(len(shards)))
    while left:
        shard = next(s for s in unused if sorted(left[: len(shards[s])]) == sorted(shards[s]))
        unused.remove(shard)
        order.append(shard)
        left = left[len(shards[shard]) :]
    return order


def within(rows: list[tuple[int, ...]], shards: list[list[tuple[int, ...]]]) -> dict[int, list[tuple[int, ...]]]:
    """The rows of each shard in the order in which an epoch has them."""
    found, left = {}, list(rows)
    for shard in runs(rows, shards):
        found[shard], left = left[: len(shards[shard])], left[len(shards[shard]) :]
    return found


def test_an_epoch_has_every_row_of_the_slow_reference_once_shard_by_shard(corpus: Path, tokenizer: Tokenizer):
    expected = reference_rows(corpus, tokenizer)
    total = sum(map(len, expected))
    assert len(expected) >= 4
    made = stream(corpus, tokenizer)
    rows = as_tuples(made.rows(0, total))
    order = runs(rows, expected)
    assert sorted(order) == list(range(len(expected)))
    first = order[0]
    assert rows[: len(expected[first])] != expected[first], "the rows of a shard must be shuffled"
    assert made.epoch == 0
    assert made.left_out == sum(len(shard) % LENGTH for shard in reference_shards(corpus, tokenizer))


def test_the_next_epoch_has_the_same_rows_in_another_order(corpus: Path, tokenizer: Tokenizer):
    expected = reference_rows(corpus, tokenizer)
    total = sum(map(len, expected))
    made = stream(corpus, tokenizer)
    epochs = [as_tuples(made.rows(number * total, total)) for number in range(6)]
    assert made.epoch == 5
    for one, other in itertools.combinations(epochs, 2):
        assert one != other
        assert sorted(one) == sorted(other)
        first, second = within(one, expected), within(other, expected)
        assert all(first[shard] != second[shard] for shard in first), "each shard must be shuffled anew"
    assert len({tuple(runs(epoch, expected)) for epoch in epochs}) > 1, "the shards must be shuffled, too"


def test_another_seed_is_another_order(corpus: Path, tokenizer: Tokenizer):
    expected = reference_rows(corpus, tokenizer)
    total = sum(map(len, expected))
    one, other = (as_tuples(stream(corpus, tokenizer, seed=seed).rows(0, total)) for seed in (0, 1))
    assert sorted(one) == sorted(other)
    first, second = within(one, expected), within(other, expected)
    assert all(first[shard] != second[shard] for shard in first)


@pytest.mark.parametrize("kept", [True, False], ids=["cache kept", "cache lost"])
def test_going_on_at_any_row_is_as_if_never_stopped(corpus: Path, tokenizer: Tokenizer, kept: bool):
    total = sum(map(len, reference_rows(corpus, tokenizer)))
    whole = stream(corpus, tokenizer).rows(0, 2 * total + 40).tokens
    for number, first in enumerate([1, 57, total - 3, total, total + 11, 2 * total, 2 * total + 39]):
        cache = corpus.parent / ("cache" if kept else f"cache-{number}")
        count = min(9, len(whole) - first)
        assert np.array_equal(stream(corpus, tokenizer, cache).rows(first, count).tokens, whole[first : first + count])


def test_worlds_of_any_size_read_the_same_rows(corpus: Path, tokenizer: Tokenizer):
    steps, per_step = 30, 8
    alone = stream(corpus, tokenizer).rows(0, steps * per_step).tokens
    for world in (2, 4):
        ranks = [stream(corpus, tokenizer) for _ in range(world)]
        strided = [rank.rows(number, steps * per_step // world, stride=world) for number, rank in enumerate(ranks)]
        for number, rows in enumerate(strided):
            assert np.array_equal(rows.tokens, alone[number::world])
        share = per_step // world
        blocks = [
            rank.rows(step * per_step + number * share, share).tokens
            for step in range(steps)
            for number, rank in enumerate(ranks)
        ]
        assert np.array_equal(np.concatenate(blocks), alone)


@given(st.integers(1, 3000), st.integers())
def test_a_permutation_has_every_place_once(size: int, seed: int):
    keys = round_keys("test", seed)
    assert sorted(permuted(place, size, keys) for place in range(size)) == list(range(size))


def test_permutations_are_not_biased_to_any_place():
    """Each of 7 values stands first about equally often over 3500 seeds: chi-square with 6 degrees of freedom."""
    counts = np.bincount([permuted(0, 7, round_keys("bias", seed)) for seed in range(3500)], minlength=7)
    assert ((counts - 500) ** 2 / 500).sum() < 22.5, "probability 0.001"


def test_documents_of_rows_end_at_eos_and_begin_at_bos(corpus: Path, tokenizer: Tokenizer):
    rows = stream(corpus, tokenizer).rows(0, 900)
    number = -1
    for tokens, documents in zip(rows.tokens.tolist(), rows.document.tolist(), strict=True):
        for place, (token, document) in enumerate(zip(tokens, documents, strict=True)):
            if place == 0 or tokens[place - 1] == tokenizer.eos_id or token == tokenizer.bos_id:
                number += 1
            assert document == number
    assert number > 910, "some rows must hold a border for this to say anything"
    assert (rows.document[:, 0] != np.roll(rows.document[:, -1], 1)).all(), "nothing goes on from row to row"


def test_a_batch_counts_positions_and_targets_in_each_document(corpus: Path, tokenizer: Tokenizer):
    rows = stream(corpus, tokenizer).rows(0, 900)
    batch = batch_of_rows(rows)
    assert batch.tokens.tolist() == rows.tokens.tolist()
    for tokens, positions, targets in zip(
        rows.tokens.tolist(), batch.positions.tolist(), batch.target_mask.tolist(), strict=True
    ):
        position = 0
        for place, token in enumerate(tokens):
            begins = place == 0 or token == tokenizer.bos_id or tokens[place - 1] == tokenizer.eos_id
            position = 0 if begins else position + 1
            assert (positions[place], targets[place]) == (position, not begins)
    assert batch.num_tokens == rows.tokens.size
    assert (batch.document[:, 1:] != batch.document[:, :-1]).sum() > 15


def test_no_token_sees_another_document(corpus: Path, tokenizer: Tokenizer):
    """Each document of a packed row gets the logits that it gets alone."""
    rows = stream(corpus, tokenizer).rows(0, 900)
    crossed = np.flatnonzero(rows.document[:, 0] != rows.document[:, -1])[:6]
    batch = batch_of_rows(Rows(rows.tokens[crossed], rows.document[crossed]))
    model = Model(tiny_architecture(vocab_size=tokenizer.vocab_size)).initialise(0)
    packed = model(batch.tokens, batch.positions, document_mask(batch.document))
    for tokens, documents, logits in zip(batch.tokens, batch.document, packed, strict=True):
        assert len(set(documents.tolist())) > 1
        for document in set(documents.tolist()):
            alone = model(tokens[documents == document][None])[0]
            torch.testing.assert_close(logits[documents == document], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bos", ["none", "the same as EOS"])
def test_a_tokenizer_without_a_bos_of_its_own_ends_documents_only(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, bos: str
):
    own = tokenizer.bos_id
    monkeypatch.setattr(tokenizer, "bos_id", None if bos == "none" else tokenizer.eos_id)
    rows = stream(corpus, tokenizer).rows(0, 900)
    ends = rows.tokens == tokenizer.eos_id
    assert ends.sum() > 15
    assert not (rows.tokens == own).any()
    assert ((rows.document[:, 1:] != rows.document[:, :-1]) == ends[:, :-1]).all()


def cached(cache: Path) -> list[list[int]]:
    return [np.fromfile(path, dtype="<u2").tolist() for path in sorted(cache.glob("*.bin"))]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_large_file_is_cut_into_shards_that_lose_nothing(tmp_path: Path, tokenizer: Tokenizer, suffix: str):
    folder = tmp_path / "large"
    folder.mkdir()
    text = story(1, 9000)
    if suffix == ".txt":
        (folder / "one.txt").write_text(text, encoding="utf-8")
        documents = [text]
    else:
        documents = text.split("\n")
        (folder / "one.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    expected = [[tokenizer.bos_id, *tokenizer.encode(one), tokenizer.eos_id] for one in documents]
    stream(folder, tokenizer).prepare(0, 10**9)
    shards = cached(tmp_path / "cache")
    assert len(shards) == -(-(folder / f"one{suffix}").stat().st_size // SHARD) > 3
    wanted = list(itertools.chain.from_iterable(expected))
    at = 0
    while shards:
        found = next(shard for shard in shards if wanted[at : at + len(shard)] == shard)
        shards.remove(found)
        at += len(found)
    assert at == len(wanted)


def test_a_file_without_line_breaks_is_one_document(tmp_path: Path, tokenizer: Tokenizer):
    folder = tmp_path / "flat"
    folder.mkdir()
    text = story(1, 4000).replace("\n", " ")
    assert len(text) > 2 * SHARD
    (folder / "one.txt").write_text(text, encoding="utf-8")
    stream(folder, tokenizer).prepare(0, 10**9)
    tokens = [shard for shard in cached(tmp_path / "cache") if shard]
    assert tokens == [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]]


OWN = r" ?[✗✓]\n?| ?\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s+"
GPT2 = r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def splitting() -> dict[str, BpeTokenizer]:
    """Tokenizers that differ in how they cut a text into words before they merge."""
    made = {}
    for name, pattern in {"own": OWN, "gpt2": GPT2, "llama3": LLAMA3}.items():
        bpe = BpeTokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        texts = [" ".join(f"a{b}\n\n  b." for b in "ab1. ") * 20, "ab ba\n ab\n\nba..\n 1\n  11" * 20]
        bpe.train_from_iterator(texts, trainer)
        made[name] = bpe
    return made


lines = st.builds(str.__add__, st.text(alphabet="ab1 .é\t'", max_size=9), st.sampled_from("abé1"))


@pytest.mark.parametrize("name", ["own", "gpt2", "llama3"])
@given(st.lists(st.tuples(lines, st.sampled_from(["\n", "\n\n", "\n \n"])), max_size=12))
def test_a_text_in_parts_has_the_tokens_of_the_whole(name: str, splitting: dict[str, BpeTokenizer], parts: list):
    text = "".join(line + end for line, end in parts)
    bpe = splitting[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "LONGEST_TEXT", 24)
        cut = list(cut_text([text[:10], text[10:]]))
    assert "".join(cut) == text
    assert all(0 < len(part) <= 24 for part in cut)
    assert [token for part in cut for token in bpe.encode(part).ids] == bpe.encode(text).ids


def test_the_tokenizer_never_gets_a_whole_large_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "one.txt").write_text(story(1, 3000) + "x" * 5000 + story(2, 100), encoding="utf-8")
    monkeypatch.setattr(text_files, "LONGEST_TEXT", 1000)
    longest = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: longest.append(len(text)) or encode(text))
    stream(folder, tokenizer).prepare(0, 10**9)
    assert max(longest) <= 1000


def test_special_cases_of_text(tmp_path: Path, tokenizer: Tokenizer):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "mark.txt").write_bytes(b"\xef\xbb\xbfthe river\r\nbends")
    (folder / "rows.jsonl").write_text(
        '\ufeff{"text": "a ferry"}\r\n{"text": ""}\n{"text": "é\\u00e9"}', encoding="utf-8"
    )
    stream(folder, tokenizer).prepare(0, 1)
    (tokens,) = cached(tmp_path / "cache")
    texts = ["the river\r\nbends", "a ferry", "éé"]
    wanted = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert tokens == list(itertools.chain.from_iterable(wanted))


def touch(path: Path, text: str) -> None:
    """Replace a file's text and move its time on, as an editor would a while later."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


def test_a_changed_file_is_noticed(corpus: Path, tokenizer: Tokenizer):
    path = corpus / "03.txt"
    before = stream(corpus, tokenizer)
    before.prepare(0, 10**9)
    old = path.read_text(encoding="utf-8")
    touch(path, old.replace("river", "ferry"))
    assert len(old) == path.stat().st_size
    made = stream(corpus, tokenizer)
    expected = reference_rows(corpus, tokenizer)
    assert sorted(as_tuples(made.rows(0, sum(map(len, expected))))) == sorted(itertools.chain.from_iterable(expected))


def test_the_fingerprint_tells_other_rows_apart(corpus: Path, tokenizer: Tokenizer):
    def fingerprint(**options) -> str:
        return stream(corpus, options.pop("by", tokenizer), **options).fingerprint

    same = fingerprint()
    assert fingerprint(cache=corpus.parent / "elsewhere") == same
    os.utime(corpus / "03.txt", ns=(0, 0))
    assert fingerprint() == same, "a copy of the folder has other times and the same rows"
    other = Tokenizer.train([story(9, 400)], 300)
    assert len({same, fingerprint(seed=4), fingerprint(row_length=9), fingerprint(by=other)}) == 4
    (corpus / "03.txt").write_text("shorter", encoding="utf-8")
    assert fingerprint() != same


def test_a_file_that_changes_under_the_run_is_an_error(corpus: Path, tokenizer: Tokenizer):
    made = stream(corpus, tokenizer)
    touch(corpus / "03.txt", "another text")
    with pytest.raises(IsthmusError, match=r"03\.txt was changed after this run listed it"):
        made.prepare(0, 10**9)
    (corpus / "03.txt").unlink()
    with pytest.raises(IsthmusError, match=r"03\.txt is gone"):
        made.prepare(0, 10**9)


@pytest.mark.parametrize("left", ["a shard without its description", "a shard cut off", "a torn description"])
def test_what_a_killed_tokenisation_left_is_done_again(corpus: Path, tokenizer: Tokenizer, left: str):
    whole = stream(corpus, tokenizer).rows(0, 500).tokens
    files = sorted((corpus.parent / "cache").glob("*.bin"))
    contents = [path.read_bytes() for path in files]
    for path in files:
        if left == "a shard cut off":
            path.write_bytes(path.read_bytes()[:101])
        elif left == "a torn description":
            path.with_suffix(".json").write_text('{"tokens": 12', encoding="utf-8")
        else:
            path.with_suffix(".json").unlink()
            path.write_bytes(b"\x01\x00" * 77)
    assert np.array_equal(stream(corpus, tokenizer).rows(0, 500).tokens, whole)
    assert [path.read_bytes() for path in files] == contents


def test_a_tokenisation_that_is_stopped_leaves_no_half_shard(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    whole = stream(corpus, tokenizer, corpus.parent / "undisturbed").rows(0, 300).tokens
    encode, calls = tokenizer.encode, itertools.count()

    def stopped(text: str) -> list[int]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return encode(text)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            stream(corpus, tokenizer).rows(0, 300)
    assert list((corpus.parent / "cache").iterdir()) == []
    assert np.array_equal(stream(corpus, tokenizer).rows(0, 300).tokens, whole)


def test_only_the_first_process_of_a_node_tokenises(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    first, waits = stream(corpus, tokenizer), []

    def wait() -> None:
        waits.append(sorted(path.suffix for path in (corpus.parent / "cache").glob("*")))
        if len(waits) == 3:
            first.prepare(0, 40)

    other = stream(corpus, tokenizer, first_of_node=False, wait=wait)
    rows = other.rows(30, 10)
    assert waits == [[], [], []], "it must wait, and write nothing, until the first has written"
    assert np.array_equal(rows.tokens, first.rows(30, 10).tokens)
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail("a finished shard needs no tokenizer"))
    assert np.array_equal(stream(corpus, tokenizer).rows(30, 10).tokens, rows.tokens)


def test_a_step_tokenises_no_more_than_it_needs(corpus: Path, tokenizer: Tokenizer):
    shards = len(reference_shards(corpus, tokenizer))
    made = stream(corpus, tokenizer)
    assert not (corpus.parent / "cache").exists()
    made.rows(0, 4)
    assert len(cached(corpus.parent / "cache")) == 1
    made.prepare(0, 10**9)
    assert len(cached(corpus.parent / "cache")) == shards


def token_folder(folder: Path, shards: dict[str, list[int]], layout: dict, dtype: str = "<u2") -> Path:
    folder.mkdir(exist_ok=True)
    for name, tokens in shards.items():
        if name.endswith(".npy"):
            np.save(folder / name, np.array(tokens, dtype=dtype))
        else:
            (folder / name).write_bytes(b"\0" * layout.get("header_bytes", 0) + np.array(tokens, dtype=dtype).tobytes())
    (folder / "index.json").write_text(json.dumps(layout), encoding="utf-8")
    return folder


def numbers(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(6, 300), k=count)


@pytest.mark.parametrize(
    ("suffix", "dtype", "header"),
    [(".bin", "uint16", 0), (".bin", "uint32", 1024), (".bin", "int32", 0), (".npy", "int64", 0), (".npy", ">u4", 0)],
)
def test_token_shards_are_read_as_they_are(tmp_path: Path, tokenizer: Tokenizer, suffix: str, dtype: str, header: int):
    """Two files of 13 and 3000 tokens are too small for a shard each: their rows run over the border between them."""
    files = {f"a{suffix}": numbers(13), f"b{suffix}": numbers(3000, seed=1)}
    layout = {"eos_id": 1, "header_bytes": header} | ({"dtype": dtype} if suffix == ".bin" else {})
    folder = token_folder(
        tmp_path / "tokens", files, layout, dtype if suffix == ".npy" else f"<{np.dtype(dtype).str[1:]}"
    )
    tokens = [*files[f"a{suffix}"], *files[f"b{suffix}"]]
    expected = [tuple(tokens[at : at + LENGTH]) for at in range(0, len(tokens) - LENGTH + 1, LENGTH)]
    made = stream(folder, tokenizer)
    assert sorted(as_tuples(made.rows(0, len(expected)))) == sorted(expected)
    assert made.left_out == 3013 % LENGTH
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("key", "wanted"), [("eos_id", [0, 0, 0, 1, 1, 1, 2, 2]), ("bos_id", [0, 0, 1, 1, 1, 2, 2, 2])]
)
def test_documents_of_token_shards_have_the_borders_that_are_declared(
    tmp_path: Path, tokenizer: Tokenizer, key: str, wanted: list[int]
):
    folder = token_folder(tmp_path / "tokens", {"a.bin": [9, 8, 5, 7, 9, 5, 8, 9]}, {"dtype": "uint16", key: 5})
    assert stream(folder, tokenizer).rows(0, 1).document.tolist() == [wanted]


def test_more_token_files_than_can_be_open_are_read(tmp_path: Path, tokenizer: Tokenizer):
    files = {f"{number:03d}.bin": numbers(20, seed=number) for number in range(100)}
    folder = token_folder(tmp_path / "tokens", files, {"dtype": "uint16", "eos_id": 1})
    tokens = list(itertools.chain.from_iterable(files.values()))
    expected = [tuple(tokens[at : at + LENGTH]) for at in range(0, 2000, LENGTH)]
    assert sorted(as_tuples(stream(folder, tokenizer).rows(0, 250))) == sorted(expected)


def empty(folder: Path) -> None:
    (folder / "README.md").write_text("nothing", encoding="utf-8")


def mixed(folder: Path) -> None:
    (folder / "a.txt").write_text("text", encoding="utf-8")
    (folder / "b.bin").write_bytes(b"\0\0")


def foreign(folder: Path) -> None:
    (folder / "a.txt").write_text("text", encoding="utf-8")
    (folder / "b.parquet").write_bytes(b"PAR1")


def only_empty_files(folder: Path) -> None:
    (folder / "a.txt").write_text("", encoding="utf-8")


def not_utf8(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"fine\nfine\nb\xe9d\n")


def json_of(text: str):
    return lambda folder: (folder / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + text.encode("latin-1"))


def bin_without_json(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"\1\0")


def tokens_with(**layout):
    content = {"dtype": "uint16", "eos_id": 1, **layout}
    content = {key: value for key, value in content.items() if value is not None}
    return lambda folder: token_folder(folder, {"a.bin": numbers(99)}, content)


def short_bin(folder: Path) -> None:
    tokens_with()(folder)
    (folder / "a.bin").write_bytes(b"\1\0\1")


def headed_bin(folder: Path) -> None:
    tokens_with()(folder)
    (folder / "a.bin").write_bytes((20240520).to_bytes(4, "little") + bytes(1020))


def megatron(folder: Path) -> None:
    tokens_with()(folder)
    (folder / "a.idx").write_bytes(b"MMIDIDX\0\0")


def large_token(folder: Path) -> None:
    token_folder(folder, {"a.bin": [6, 40000, *numbers(20)]}, {"dtype": "uint16", "eos_id": 1})


def other_borders(folder: Path) -> None:
    token_folder(folder, {"a.bin": numbers(99), "b.bin": numbers(99)}, {"dtype": "uint16", "eos_id": 1})
    (folder / "b.json").write_text('{"dtype": "uint16", "eos_id": 2}', encoding="utf-8")


def floats(folder: Path) -> None:
    token_folder(folder, {"a.npy": numbers(9)}, {"eos_id": 1}, "f4")


def matrix(folder: Path) -> None:
    tokens_with()(folder)
    np.save(folder / "b.npy", np.zeros((3, 3), dtype=np.int64))


def no_array(folder: Path) -> None:
    tokens_with()(folder)
    (folder / "b.npy").write_bytes(b"nothing")


def objects(folder: Path) -> None:
    tokens_with()(folder)
    np.save(folder / "b.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


FAULTS = {
    empty: r"holds nothing to train on: put \*\.txt",
    mixed: r"mixes text \(a\.txt\) and token shards \(b\.bin\)",
    foreign: r"b\.parquet is neither text .* Convert it, or move it",
    only_empty_files: r"every text file in .* is empty",
    not_utf8: r"a\.txt:3: not UTF-8 text",
    json_of("{"): r"a\.jsonl:3: not valid JSON: .* column",
    json_of('["text"]'): r"a\.jsonl:3: a line must be an object",
    json_of('{"content": "x", "id": 1}'): r"a\.jsonl:3: the key \"text\" .* here are 'content', 'id'",
    json_of('{"text": "\xe9"}'): r"a\.jsonl:3: not UTF-8 text",
    json_of('{"text": "a\\ud800"}'): r"a\.jsonl:3: the text has half of a surrogate pair at character 1",
    bin_without_json: r"nothing says what .*a\.bin holds\. Write .*index\.json with the dtype",
    tokens_with(dtype=None): r"does not say the dtype of a\.bin",
    tokens_with(dtype="float16"): r"index\.json does not describe token shards: dtype: .* Example:",
    tokens_with(chunks=[]): r"chunks: .* Known keys: dtype, eos_id",
    tokens_with(eos_id=None): r"does not say where documents end",
    tokens_with(bos_id=1): r"the same eos_id and bos_id",
    tokens_with(vocab_size=50257): r"use 50257 tokens, the tokenizer has \d+",
    tokens_with(eos_id=50256): r"use 50257 tokens, the tokenizer has \d+",
    tokens_with(tokenizer_sha256="ab" * 32): r"another tokenizer \(tokenizer_sha256 abababab",
    tokens_with(tokens=98): r"a\.bin has 99 tokens, its description says 98",
    tokens_with(dtype="uint32"): r"198 bytes of tokens, which is not a multiple of the 4 bytes of uint32",
    short_bin: r"3 bytes of tokens, which is not a multiple of the 2",
    headed_bin: r'write "header_bytes": 1024',
    megatron: r"a\.idx is a Megatron index.*--append-eod",
    large_token: r"a\.bin holds the token 40000, but the tokenizer has",
    other_borders: r"b\.bin has eos_id 2 and bos_id None, a\.bin has 1",
    floats: r"array of float32 with 1 dimensions",
    matrix: r"array of int64 with 2 dimensions",
    no_array: r"b\.npy is not a \.npy array",
    objects: r"b\.npy is not a \.npy array",
}


@pytest.mark.parametrize(("make", "message"), FAULTS.items())
def test_a_folder_that_cannot_be_used_says_why_and_what_to_do(tmp_path: Path, tokenizer: Tokenizer, make, message):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(IsthmusError, match=f"(?s){message}"):
        stream(folder, tokenizer).rows(0, 2)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, tokenizer: Tokenizer):
    with pytest.raises(IsthmusError, match=r"there is no folder .*nowhere"):
        stream(tmp_path / "nowhere", tokenizer)


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_folder_with_less_than_a_row_says_so(tmp_path: Path, tokenizer: Tokenizer, kind: str):
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "text":
        (folder / "a.txt").write_text("a", encoding="utf-8")
    else:
        token_folder(folder, {"a.bin": [6, 7, 8]}, {"dtype": "uint16", "eos_id": 1})
    with pytest.raises(IsthmusError, match="has 3 tokens and no shard of it a whole row of 8: add data"):
        stream(folder, tokenizer).rows(0, 1)


def test_a_linked_folder_is_read_once(corpus: Path, tokenizer: Tokenizer):
    linked = corpus.parent / "linked"
    linked.mkdir()
    (linked / "data").symlink_to(corpus)
    (corpus / "deep" / "loop").symlink_to(corpus)
    expected = sorted(itertools.chain.from_iterable(reference_rows(corpus, tokenizer)))
    assert sorted(as_tuples(stream(linked, tokenizer).rows(0, len(expected)))) == expected


def test_the_hash_of_a_tokenizer_survives_saving_and_loading(tmp_path: Path, tokenizer: Tokenizer):
    tokenizer.save(tmp_path)
    assert tokenizer_sha256(Tokenizer.load(tmp_path)) == tokenizer_sha256(tokenizer)
    assert tokenizer_sha256(Tokenizer.train(["other text"], 290)) != tokenizer_sha256(tokenizer)


def texts(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.suffix in (".txt", ".jsonl"):
            yield from documents_of(path)


def test_a_sample_of_a_small_folder_is_all_of_it(corpus: Path):
    assert sorted(sample_texts(corpus, 10**9)) == sorted(text for text in texts(corpus) if text)


def test_a_sample_of_a_large_folder_is_as_large_as_asked_and_from_all_over(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("isthmus.data.pretrain.SAMPLE_PIECE_BYTES", 100)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"é{number:03d}é" * 500, encoding="utf-8")
    sample = list(sample_texts(tmp_path, 4001))
    assert 3900 < len("".join(sample).encode()) <= 4001
    assert len({text[1:4] for text in sample}) == 40
    assert sample == list(sample_texts(tmp_path, 4001))
    few = list(sample_texts(tmp_path, 500))
    assert len(few) == 5
    assert few != [f"é{number:03d}é" * 14 for number in range(5)], "not only the first files"


def test_token_shards_need_the_tokenizer_that_wrote_them(tmp_path: Path, tokenizer: Tokenizer):
    tokens_with(tokenizer_sha256=tokenizer_sha256(tokenizer), vocab_size=tokenizer.vocab_size)(tmp_path)
    for call in (lambda: list(sample_texts(tmp_path, 1000)), lambda: corpus_tokenizer(tmp_path)):
        with pytest.raises(IsthmusError, match=r"holds token shards.*put the tokenizer\.json"):
            call()
    tokenizer.save(tmp_path)
    loaded = corpus_tokenizer(tmp_path)
    assert loaded is not None
    assert stream(tmp_path, loaded).rows(0, 3).tokens.max() < tokenizer.vocab_size


def test_a_text_folder_may_hold_its_tokenizer(corpus: Path, tokenizer: Tokenizer):
    assert corpus_tokenizer(corpus) is None
    before = stream(corpus, tokenizer).fingerprint
    tokenizer.save(corpus)
    (corpus / "merges.txt").write_text("a b", encoding="utf-8")
    assert stream(corpus, tokenizer).fingerprint == before, "the files of a tokenizer are not data"
    loaded = corpus_tokenizer(corpus)
    assert loaded is not None
    assert np.array_equal(stream(corpus, loaded).rows(0, 20).tokens, stream(corpus, tokenizer).rows(0, 20).tokens)
