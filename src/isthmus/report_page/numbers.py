"""Numbers as people read them: shares as percent, seconds as minutes, bytes with a prefix."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from isthmus.run import Figure

MINUS = "−"
NO_BREAK_SPACE = "\u00a0"
SHARE_UNITS = frozenset({"share", "fraction", "probability"})
RATE_UNITS = frozenset({"FLOP/s", "FLOPS", "OP/s", "B/s", "bytes/s", "bit/s", "FLOP"})
BYTE_UNITS = frozenset({"B", "byte", "bytes"})
SECOND_UNITS = frozenset({"s", "seconds"})
BINARY_PREFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi")
DECIMAL_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
SPELLING = {
    "cpu": "CPU",
    "fp8": "FP8",
    "grpo": "GRPO",
    "handoff": "hand-off",
    "hbm": "HBM",
    "heldout": "held-out",
    "kl": "KL",
    "logprob": "log-probability",
    "mfu": "MFU",
    "modelslim": "ModelSlim",
    "mtbf": "time between failures",
    "mtp": "MTP",
    "mxfp8": "MXFP8",
    "p50": "P50",
    "p90": "P90",
    "p99": "P99",
    "pretrain": "pretraining",
    "rl": "RL",
    "sft": "SFT",
    "top1": "top-1",
    "w8a8": "W8A8",
}
PHRASES = {
    "abs dlogp": "|Δ log p|",
    "mismatch abs": "mismatch, |Δ log p|",
    "mismatch k3": "mismatch, KL (k3)",
    "per s": "per second",
    "unseen rate per chip hour": "failures that could have stayed unseen",
}
UNIT_SUFFIXES = ("_s", "_ms", "_us", "_h", "_tflops", "_gbs", "_bytes")


def quantity(figure: Figure) -> str:
    """The value with its unit; "unknown" where there is no value. A bound from above is said to be one."""
    if figure.value is None:
        return "unknown"
    return ("at most " if is_bound(figure) else "") + with_unit(figure.value, figure.unit)


def is_bound(figure: Figure) -> bool:
    """Whether the value is the upper end of an interval that begins at 0: what could have stayed unseen."""
    return figure.low == 0 and figure.value == figure.high and bool(figure.value)


def interval(figure: Figure) -> str:
    """Low and high end in the unit of `quantity`, or an empty string where there is no interval."""
    if figure.low is None or figure.high is None or is_bound(figure):
        return ""
    if figure.unit in SHARE_UNITS or figure.unit == "%":
        factor = 100 if figure.unit in SHARE_UNITS else 1
        return f"{percent(factor * figure.low)} to {percent(factor * figure.high)}{NO_BREAK_SPACE}%"
    if figure.unit in SECOND_UNITS | BYTE_UNITS | RATE_UNITS:
        return f"{with_unit(figure.low, figure.unit)} to {with_unit(figure.high, figure.unit)}"
    return f"{plain(figure.low)} to {plain(figure.high)}"


def with_unit(value: float, unit: str) -> str:
    if unit in SHARE_UNITS or unit == "%":
        return f"{percent(100 * value if unit in SHARE_UNITS else value)}{NO_BREAK_SPACE}%"
    if unit in SECOND_UNITS:
        return duration(value)
    if unit == "×":
        return f"{signed(value, 2)}{NO_BREAK_SPACE}×"
    if unit in BYTE_UNITS:
        return prefixed(value, 1024, BINARY_PREFIXES, "B")
    if unit in RATE_UNITS:
        return prefixed(value, 1000, DECIMAL_PREFIXES, unit)
    return f"{plain(value)}{NO_BREAK_SPACE}{unit}" if unit else plain(value)


def points(figure: Figure, end: float | None) -> str:
    """A difference of shares in percentage points, signed: of the figure's value, or of one `end` of its interval."""
    if end is None:
        return "unknown"
    scaled = 100 * end if figure.unit in SHARE_UNITS else end
    return ("+" if scaled > 0 else "") + signed(scaled, 1)


def fine_points(value: float) -> str:
    """Percentage points with a sign; two decimals below one point, so that a small loss does not read as none."""
    return ("+" if value > 0 else "") + signed(value, 2 if abs(value) < 1 else 1)


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours."""
    if abs(seconds) < 1e-3:
        return plain(seconds * 1e6) + f"{NO_BREAK_SPACE}µs" if seconds else f"0{NO_BREAK_SPACE}s"
    if abs(seconds) < 1:
        return f"{plain(seconds * 1e3)}{NO_BREAK_SPACE}ms"
    if abs(seconds) < 120:
        return f"{signed(seconds, 1)}{NO_BREAK_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}{NO_BREAK_SPACE}min {rest:02d}{NO_BREAK_SPACE}s"
    return f"{minutes // 60}{NO_BREAK_SPACE}h {minutes % 60:02d}{NO_BREAK_SPACE}min"


def prefixed(value: float, base: int, prefixes: tuple[str, ...], unit: str) -> str:
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{plain(value)}{NO_BREAK_SPACE}{prefixes[power]}{unit}"


def percent(value: float) -> str:
    """One decimal, or as many as keep 0.04 from reading as 0 and 99.98 from reading as 100."""
    decimals = 1
    while decimals < 6 and value not in (0, 100) and round(abs(value), decimals) in (0, 100):
        decimals += 1
    return signed(value, decimals)


def plain(value: float) -> str:
    """Four significant digits, thousands apart, no exponent between 1e-4 and 1e7."""
    if value == 0:
        return "0"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e7):
        return f"{int(value):,}".replace("-", MINUS)
    if not 1e-4 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else (f"{value:.3g}", "0")
        return f"{mantissa}·10{_superscript(int(exponent))}".replace("-", MINUS)
    return f"{value:,.4g}".replace("-", MINUS) if abs(value) < 1e4 else f"{value:,.0f}".replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def label(name: str) -> str:
    """A key such as `top1_agreement` as words, with a capital unless the first word is a name such as bf16."""
    words = phrase(name)
    return words if re.match(r"[a-z]+\d", words) else words[:1].upper() + words[1:]


def phrase(name: str) -> str:
    """A key such as `bf16.mean_kl` as words; a unit at its end is dropped, for the value has it."""
    if not name.endswith("_per_s"):
        name = next((name.removesuffix(suffix) for suffix in UNIT_SUFFIXES if name.endswith(suffix)), name)
    words = re.sub(
        r"\w+",
        lambda word: SPELLING.get(word[0], word[0]),
        re.sub(r"\.(?!json\b)", ": ", name.replace("_", " ")).strip(),
    )
    for phrase_of_key, spelled in PHRASES.items():
        words = re.sub(rf"\b{phrase_of_key}\b", spelled, words)
    return words


def sentence(text: str) -> Markup:
    """Escaped text as a sentence, with a capital and a full stop; `quoted` words become code."""
    text = text.strip()
    text = text if text.endswith((".", "!", "?")) else f"{text}."
    return prose(text[:1].upper() + text[1:] if re.match(r"[a-z]+([ ,']|: )", text) else text)


def prose(text: str) -> Markup:
    """Escaped text; `quoted` words become code."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(text))))


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
