"""Numbers as people write them, exactly, in a time that does not depend on what is written.

| Written | Read as |
|---|---|
| `1,234,567.5`, `12,34,567`, `1 234 567`, `1'234'567` | groups of digits as in English, India, SI and Switzerland |
| `1.5e3`, `1.5×10^3`, `1.5*10^{3}` | a decimal number times a power of ten |
| `3/4`, `1 3/4`, `½` | a fraction, the last two with what stands before it |
| `50%` | a hundredth of it |
| `$5`, `5 €` | a number with a currency |
| `9{,}500`, `9\\,500`, `1.5 \\times 10^3`, `\\frac{1}{2}`, `50\\%`, `\\$5`, `$5$`, `\\(5\\)` | the same in LaTeX |

`1,2,3`, `1,2` and `1_2` are no numbers: a list and a name may look so. A power of ten is never multiplied out.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

LONGEST_NUMBER = 128
"""Characters. What is longer is a text."""

_GROUP = "['\u2019 \u00a0\u2009\u202f]"
_WHOLE = (
    r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}"
    rf"|\d{{1,3}}(?P<group>{_GROUP})\d{{3}}(?:(?P=group)\d{{3}})*|\d+)"
)
_POWER = r"(?:[eE](?P<e>[+-]?\d{1,9})|\s*[×*·]\s*10\^(?P<ten>[+-]?\d{1,9}|\{[+-]?\d{1,9}\}))"
_DECIMAL = re.compile(rf"(?:(?P<whole>{_WHOLE})(?:\.(?P<part>\d*))?|\.(?P<only>\d+)){_POWER}?")
_DECIMAL_COMMA = re.compile(r"\d+,\d+")
_FRACTION = re.compile(r"(?:(?P<whole>\d+)\s+)?(?P<above>\d+)\s*/\s*(?P<below>\d+)")
_AROUND = re.compile(
    r"(?P<minus>[+-]?)\s*(?P<before>[$€£¥₹]?)\s*(?P<inner>[+-]?)(?P<number>[^$€£¥₹%]+?)\s*(?P<after>[$€£¥₹%]?)"
)
_VULGAR = re.compile(r"(?P<whole>\d*)\s*(?P<sign>\D)")
_LATEX = {r"\$": "$", r"\%": "%", r"\times": "×", r"\cdot": "·", "{,}": ",", r"\,": "\u202f", r"\!": ""}
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)(\d))")
_LATEX_SIGNS = (("$", "$"), (r"\(", r"\)"))
_SAME = str.maketrans({"−": "-", "﹣": "-", "－": "-", "＋": "+", "，": ",", "．": ".", "⁄": "/", "／": "/", "％": "%"})


@dataclass(frozen=True)
class Number:
    """A value, exactly, and the sign of its currency if it has one."""

    value: Decimal | Fraction
    currency: str = ""


def read_number(text: str, *, decimal_comma: bool = False) -> Number | None:
    """The number that a text is, or None. With `decimal_comma` a comma that groups no thousands is a decimal point."""
    if len(text) > LONGEST_NUMBER:
        return None
    found = _AROUND.fullmatch(_plain(text.strip()).translate(_SAME))
    if found is None or (found["minus"] and found["inner"]) or (found["before"] and found["after"]):
        return None
    value = _value(found["number"], decimal_comma)
    if value is None:
        return None
    if "-" in (found["minus"], found["inner"]):
        value = value.copy_negate() if isinstance(value, Decimal) else -value
    mark = found["before"] + found["after"]
    return Number(_hundredth(value)) if mark == "%" else Number(value, mark)


def _plain(text: str) -> str:
    """What LaTeX writes, without LaTeX."""
    for opening, closing in _LATEX_SIGNS:
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            text = text[len(opening) : -len(closing)].strip()
    if "\\" not in text and "{" not in text:
        return text
    for written, meant in _LATEX.items():
        text = text.replace(written, meant)
    return _LATEX_FRACTION.sub(lambda found: f" {found[1] or found[3]}/{found[2] or found[4]}", text).strip()


def _value(text: str, decimal_comma: bool) -> Decimal | Fraction | None:
    if found := _DECIMAL.fullmatch(text):
        return _decimal(found)
    if decimal_comma and _DECIMAL_COMMA.fullmatch(text):
        return Decimal(text.replace(",", "."))
    if found := _FRACTION.fullmatch(text):
        return _fraction(found["whole"], int(found["above"]), int(found["below"]))
    found = _VULGAR.fullmatch(text)
    sign = unicodedata.normalize("NFKC", found["sign"]).partition("\u2044") if found else ("", "", "")
    if found and sign[0].isdecimal() and sign[2].isdecimal():
        return _fraction(found["whole"], int(sign[0]), int(sign[2]))
    return None


def _decimal(found: re.Match[str]) -> Decimal:
    """Without rounding: only the text of a decimal number is exact whatever its length."""
    whole = re.sub(r"\D", "", found["whole"] or "0")
    power = (found["e"] or found["ten"] or "0").strip("{}")
    return Decimal(f"{whole}.{found['part'] or found['only'] or '0'}e{power}")


def _fraction(whole: str | None, above: int, below: int) -> Fraction | None:
    return None if below == 0 else int(whole or 0) + Fraction(above, below)


def _hundredth(value: Decimal | Fraction) -> Decimal | Fraction:
    if isinstance(value, Fraction):
        return value / 100
    sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    return Decimal((sign, digits, exponent - 2))
