"""In which language a text is written: by the scripts of its words, and by function words where languages share one.

A word counts by its script; where no spaces part words, as in Han, a character does. Neutral are numbers, formulas,
code, addresses, single letters (variables), names of functions such as sin, and abbreviations in capitals: they are the
same in every language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache

from isthmus.errors import IsthmusError, suggestion

HAN, KANA = "CJK", frozenset({"HIRAGANA", "KATAKANA"})
UNSPACED = frozenset({HAN, "THAI", "LAO", "KHMER", "MYANMAR"}) | KANA
"""Scripts that write words without spaces between them: each letter counts."""

_LISTS = {
    "en": "the of and to is that it for was on are as with his they at be this have from or by but not what all "
    "were when we there can an your which their if will each about how up out them then she so would into "
    "has two more her like him see could than been its who now my made over did down only us",
    "de": "der die das und ist nicht ich du er sie es wir ihr ein eine einen dem den des mit auf für von zu zum "
    "zur im am auch aber oder wenn dann wie was wer sind war hat haben werden wird kann noch nur nach bei "
    "aus über mehr so als",
    "fr": "le la les des et est pas que qui dans pour sur avec une un du au aux ce cette ces il elle nous vous "
    "ils je ne se son sa ses mais ou donc car si plus comme par être avoir fait sont était ont alors "
    "aussi leur",
    "es": "el la los las de y que es en no un una por con para su se lo como más pero sus le ya o este sí "
    "porque esta entre cuando muy sin sobre también me hasta hay donde quien desde todo nos durante son "
    "fue ser",
    "it": "il lo la gli le di e che è un una non per con si da come più ma questo della del dei delle sono nel "
    "nella anche se quando ha essere al alla ci loro poi perché io cosa dove",
    "pt": "o a os as de e que é em não um uma por com para se do da dos das na no mais como mas ao ele ela foi "
    "são ser tem também já quando muito nos eu isso entre depois sem mesmo aos seus",
    "nl": "de het een en van is niet dat die in op te zijn met voor er aan ook als maar om hij ze wij bij nog "
    "naar dan uit wat deze door over kan worden heeft of zo was hebben",
    "ru": "и в не на что он с это как по но они мы вы она к у же от за для из то все так его ее был была если "
    "или ни быть когда только уже бы до при",
    "uk": "і в не на що він з це як але вони ми ви вона до у же від за для із то все так його її був була якщо "
    "або ні бути коли тільки вже би при та є",
}
FUNCTION_WORDS = {name: frozenset(words.split()) for name, words in _LISTS.items()}
"""The commonest words of a language, which mean nothing by themselves; one that shares its script has to have some."""
SCRIPTS = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl"), frozenset({"LATIN"})),
    **dict.fromkeys(("ru", "uk"), frozenset({"CYRILLIC"})),
    "zh": frozenset({HAN}),
    "ja": frozenset({HAN}) | KANA,
    "ko": frozenset({"HANGUL"}),
    "ar": frozenset({"ARABIC"}),
    "he": frozenset({"HEBREW"}),
    "el": frozenset({"GREEK"}),
    "hi": frozenset({"DEVANAGARI"}),
    "th": frozenset({"THAI"}),
}

_FUNCTIONS = frozenset(
    ["sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "max", "min", "mod", "gcd", "lcm", "lim", "sqrt"]
)
_NEUTRAL = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$|\\\[(?:[^\\]|\\[^\[\]])*\\\]|\\\((?:[^\\]|\\[^()])*\\\)"
    r"|\\[A-Za-z]+|</?\w+>|(?<!\w)\w{1,16}://\S+",
    re.DOTALL,
)
"""Code, formulas, commands of LaTeX, tags, addresses. What opens one and does not close it is passed in linear time."""
_MARKS = frozenset("`$\\<:")
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


@dataclass(frozen=True)
class Language:
    """Scripts, and a code where function words tell the language from others in these scripts."""

    scripts: frozenset[str]
    code: str | None = None


def language_named(code: str) -> Language:
    """The language of an ISO 639-1 code. Raises IsthmusError for one that is not known here."""
    if code not in SCRIPTS:
        raise IsthmusError(f"unknown language {code!r}{suggestion(code, SCRIPTS)}")
    return Language(SCRIPTS[code], code if code in FUNCTION_WORDS else None)


def language_of(text: str) -> Language | None:
    """The language that most of a text is in; None for a text without words."""
    words = [word for line in _lines(text) for word in line]
    scripts = Counter(script for script, _ in words)
    if not scripts:
        return None
    kana = sum(scripts[one] for one in KANA)
    if kana and scripts[HAN] + kana > len(words) / 2:
        return Language(SCRIPTS["ja"])
    script = scripts.most_common(1)[0][0]
    hits = _hits([word for found, word in words if found == script], script)
    (code, most), *others = [*hits.most_common(2), ("", 0)]
    return Language(frozenset({script}), code if most and (not others or others[0][1] < most) else None)


def share_in(text: str, language: Language | None) -> float:
    """The share of the words of a text that are in a language, from 0 to 1; 1 for a text without words.

    Without a language, the share of the script that most of its words are in.
    """
    lines = _lines(text)
    total = sum(map(len, lines))
    if not total:
        return 1.0
    if language is None:
        scripts = Counter(script for line in lines for script, _ in line)
        return scripts.most_common(1)[0][1] / total
    return sum(_count_in(line, language) for line in lines) / total


Line = list[tuple[str, str]]


def _count_in(line: Line, language: Language) -> int:
    """Words of a line in a language: none of those in its script if the line is in another language of that script."""
    ours = [(script, word) for script, word in line if script in language.scripts]
    if language.code is None or not ours:
        return len(ours)
    hits = _hits([word for _, word in ours], ours[0][0])
    return len(ours) if max(hits.values(), default=0) <= hits[language.code] else 0


def _hits(words: list[str], script: str) -> Counter[str]:
    """How many words are function words, by language of the script."""
    codes = [code for code in FUNCTION_WORDS if script in SCRIPTS[code]]
    return Counter({code: sum(word in FUNCTION_WORDS[code] for word in words) for code in codes})


def _lines(text: str) -> list[Line]:
    """(script, word in small letters) of the words that have a language, line by line."""
    bare = text if text.isascii() else unicodedata.normalize("NFKC", text)
    if not _MARKS.isdisjoint(bare):
        bare = _NEUTRAL.sub(" ", bare)
    return [words for line in bare.split("\n") if (words := _words(line))]


def _words(line: str) -> Line:
    found: Line = []
    for word in _WORD.findall(line):
        if word.isascii():
            found += [] if _is_neutral(word) else [("LATIN", word.lower())]
        elif any(script_of(letter) in UNSPACED for letter in word):
            found += [(script_of(letter), letter) for letter in word if script_of(letter)]
        elif not _is_neutral(word):
            found.append((Counter(filter(None, map(script_of, word))).most_common(1)[0][0], word.lower()))
    return found


def _is_neutral(word: str) -> bool:
    if len(word) < 2 or not word.replace("'", "").replace("\u2019", "").isalpha():
        return True
    return (len(word) <= 5 and word.isupper()) or word.lower() in _FUNCTIONS


@cache
def script_of(letter: str) -> str:
    """The script of a letter by its name in Unicode; nothing for what is no letter."""
    return unicodedata.name(letter, "").split(" ")[0] if letter.isalpha() else ""
