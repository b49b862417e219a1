"""In which language a text is, and which samples the filters keep."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.rewards import Sample
from isthmus.rewards.parts import filters
from isthmus.tasks import Problem, completion_text, jsonl
from isthmus.tasks.parts.languages import FUNCTION_WORDS, SCRIPTS, language_named, language_of, share_in

DEADLINE_S = 1.0
SENTENCES = {
    "en": "How many apples are in the basket, and what is left when we take two of them?",
    "de": "Wie viele Äpfel sind in dem Korb, und was ist noch da, wenn wir zwei davon nehmen?",
    "fr": "Combien de pommes sont dans le panier, et que reste-t-il si nous en prenons deux ?",
    "es": "¿Cuántas manzanas hay en la cesta y qué queda cuando sacamos dos de ellas para el niño?",
    "it": "Quante mele sono nel cesto, e che cosa resta se ne prendiamo due per la nonna?",
    "pt": "Quantas maçãs há no cesto e o que sobra quando tiramos duas delas para os meninos? Não sei.",
    "nl": "Hoeveel appels zijn er in de mand, en wat is er over als we er twee van nemen?",
    "ru": "Сколько яблок было в корзине и что останется, если мы из неё возьмём два?",
    "uk": "Скільки яблук було в кошику і що залишиться, якщо ми візьмемо два для неї?",
    "zh": "篮子里有多少个苹果？拿走两个还剩多少？",
    "ja": "かごの中にりんごはいくつありますか。二つ取ると何個残りますか。",
    "ko": "바구니에 사과가 몇 개 있습니까?",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_in_its_language_and_in_no_other(code):
    found = language_of(SENTENCES[code])
    assert found == language_named(code)
    for other, sentence in SENTENCES.items():
        expected = 1.0 if other == code else 0.0
        shares_han = {code, other} <= {"zh", "ja"}
        assert share_in(sentence, found) == expected or shares_han, other


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("First we add them. 然后", 4 / 6),
        ("First we add them.\nDann ist das nicht mehr so viel.", 4 / 11),
        ("2 + 3 = 5, $x = \\frac{a}{b}$, sin(x), x1, foo_bar, GPU, `код`, https://пример.рф/путь", 1.0),
        ("```python\nпечать = 1\n```\nso it is", 1.0),
        ("\\(\\text{да}\\) is a word", 1.0),
        ("это", 0.0),
        ("", 1.0),
    ],
)
def test_numbers_formulas_and_code_are_in_every_language(text, share):
    assert share_in(text, language_named("en")) == pytest.approx(share)


def test_a_prompt_without_words_asks_for_one_script():
    assert language_of("2 + 3 = ?") is None
    assert share_in("we add them 加", None) == 0.75


@given(st.text(max_size=200), st.sampled_from(sorted(SCRIPTS)))
def test_a_share_is_a_share_whatever_is_written(text, code):
    assert 0.0 <= share_in(text, language_named(code)) <= 1.0
    language_of(text)


@pytest.mark.parametrize(
    "sign", ["```", "$", "\\(", "\\[", "<a", "`", "x'", "://", "a", "a_", "<answer>", "\u00bd", "字"]
)
def test_no_text_takes_longer_than_a_deadline(sign):
    began = time.thread_time()
    share_in(sign * 50_001, language_named("en"))
    assert time.thread_time() - began < DEADLINE_S


def test_languages_of_one_script_can_be_told_apart():
    for code, words in FUNCTION_WORDS.items():
        others = [other for other in FUNCTION_WORDS if other != code and SCRIPTS[other] == SCRIPTS[code]]
        assert others and all(len(words - FUNCTION_WORDS[other]) > 20 for other in others)


TASK = jsonl.JsonlTask([], [])


def sample(thought="We add them.", answer="5", prompt="What is 2 + 3?", tokens=10, finished=True) -> Sample:
    return Sample(Problem(prompt, prompt, "5"), TASK, completion_text(thought, answer), tokens, 100, finished)


def test_filters_keep_what_is_worth_learning_and_count_what_they_drop():
    good, wrong, mixed = sample(), sample(answer="6"), sample("We add 两个数字在一起.")
    long, cut = sample(tokens=51), sample(finished=False)
    again = sample("We add them, and add them, and so on it goes.\n" * 5)
    heldout = sample(prompt="What is 7 + 8?")
    chosen = {
        "correct": filters.correct(),
        "one-language": filters.one_language(),
        "not-longer-than": filters.not_longer_than(50),
        "no-repetition": filters.no_repetition(),
        "unlike-heldout": filters.unlike_heldout(["what is 7 + 8?"]),
    }
    assert list(chosen) == list(filters.FILTERS)
    kept = filters.keep([good, wrong, mixed, long, cut, again, heldout, wrong], chosen)
    assert kept.samples == [good]
    assert list(kept.dropped.values()) == [2, 1, 2, 1, 1]
    assert filters.keep([wrong, mixed], {}).samples == [wrong, mixed]


def test_a_run_of_words_of_a_held_out_prompt_is_found_unless_all_prompts_have_it():
    frame = "Read the story with care, then answer the question with one number alone. "
    stories = [f"{frame}Story {n}: {' '.join(f'w{n}x{k}' for k in range(12))}" for n in range(60)]
    passes = filters.unlike_heldout(stories)
    assert passes(sample(prompt=f"{frame}Another story altogether."))
    assert not passes(sample(prompt=f"A new frame. {stories[7][-90:]}"))
    assert not passes(sample(thought=stories[9][-90:]))
    assert not passes(sample(prompt=stories[3].upper()))


def test_what_repeats_and_what_only_resembles():
    passes = filters.no_repetition(length=4, times=2)
    assert passes(sample("1 + 2 = 3, 1 + 3 = 4, 1 + 4 = 5, 1 + 5 = 6"))
    assert not passes(sample("wait, let me see. " * 3))
    assert not passes(sample("再想一想。" * 3))
