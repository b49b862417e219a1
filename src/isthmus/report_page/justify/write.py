"""The record as a page in one language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from itertools import groupby
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from isthmus.records import RuleFinding, Ruling
from isthmus.report_page import numbers
from isthmus.report_page.acts import TRAINING
from isthmus.report_page.justify.record import CaseOf, JustifyRecord, PoolOf, Trial
from isthmus.report_page.justify.words import Language, Words
from isthmus.run import Figure


@dataclass(frozen=True)
class CaseText:
    """Acts of one use on one pool, which have their trials in common."""

    acts: str
    found: str
    pool: PoolOf
    trials: list[Trial]
    lines: list[str]
    again: str


def write(record: JustifyRecord, language: Language) -> str:
    """The whole page. Equal records give equal bytes."""
    words = Words(language)
    environment = Environment(
        loader=FunctionLoader(_page_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pools = {pool.pool: pool for pool in record.pools}
    asked = [pool for pool in record.pools if pool.side != "domestic"]
    binding = [found for one in (record.rulings or {}).values() for found in one.findings]
    return environment.get_template("page.html.jinja").render(
        r=record,
        w=words,
        style=Markup(_page_file("page.css")),
        day=datetime.fromtimestamp(record.ended, UTC).date(),
        asked=asked,
        pool_of=pools.__getitem__,
        acts_on=lambda pool: _listed(words, [act.kind for act in record.acts if act.pool == pool.pool]),
        chip=_chip_writer(words),
        capital=numbers.capital,
        amount=_amount_writer(words),
        share=_share_writer(words),
        percent=numbers.percent,
        cases=_cases(record, words),
        buyers=_buyers(record, words),
        step=_step_writer(words),
        since=_since,
        notes=sum(found.effect == "note" for found in binding),
        notice=_notice(record, words),
        crossed=_crossed(record, words),
        accuracy=_accuracy(record, words),
        seal=_seal(record, words),
    )


def _listed(words: Words, kinds: Sequence[str]) -> str:
    return words.text("separator").join(words.term("act", kind) for kind in kinds)


def _chip_writer(words: Words) -> Callable[[PoolOf, bool], str]:
    def chip(pool: PoolOf, with_maker: bool) -> str:
        note = words.text("is_rehearsed") if pool.rehearsed else ""
        if with_maker:
            unlisted = words.text("made_unlisted")
            note += words.text("made_in", country=words.name("country", pool.maker)) if pool.maker else unlisted
        return words.text("chips", count=f"{pool.count:,}", name=pool.chip_name, pool=pool.pool, note=note)

    return chip


def _written(value: float) -> str:
    """Whole numbers from a hundred on, with every digit: an authority adds them up."""
    return f"{value:,.0f}" if value >= 100 else numbers.plain(value)


def _amount_writer(words: Words) -> Callable[..., str | Markup]:
    def amount(figure: Figure | None, absent: str = "not_known") -> str | Markup:
        """The number, its interval and its kind; its unit where the column does not say it."""
        if figure is None or figure.value is None:
            return words.text(absent)
        unit = "" if figure.unit in ("chip-hours", "tokens") else f" {figure.unit}"
        kind = Markup("<small>{}</small>").format(words.term("kind", figure.kind))
        return Markup("{}{}{} {}").format(_written(figure.value), _interval(figure, words), unit, kind)

    return amount


def _share_writer(words: Words) -> Callable[..., str]:
    def share(part: float | None, figure: Figure | None, absent: str = "not_known") -> str:
        if part is None:
            return words.text(absent)
        return words.text("share", share=numbers.percent(100 * part))

    return share


def _step_writer(words: Words) -> Callable[[Ruling, str], str]:
    def step(ruling: Ruling, name: str) -> str:
        found = next(one for one in ruling.steps if one.name == name)
        if found.value is not None:
            return numbers.plain(found.value)
        return words.text("not_known") if found.low is None else f"≥ {numbers.plain(found.low)}"

    return step


def _since(found: RuleFinding) -> str:
    return f"{found.since:%Y-%m-%d}" if found.day_known else f"{found.since:%Y-%m}"


def _cases(record: JustifyRecord, words: Words) -> list[CaseText]:
    """One text for all acts of training on a pool, and one for all others: their evidence is the same."""

    def use(case: CaseOf) -> tuple[str, bool]:
        return case.pool.pool, case.kind in TRAINING

    groups = [list(group) for _, group in groupby(sorted(record.cases, key=use), key=use)]
    return [
        CaseText(
            acts=numbers.capital(_listed(words, [case.kind for case in group])),
            found=words.text("found_here", verdict=words.term("verdict", group[0].verdict)),
            pool=group[0].pool,
            trials=group[0].trials,
            lines=_comparisons(group, words),
            again=_again(group[0], record, words),
        )
        for group in groups
    ]


def _comparisons(cases: Sequence[CaseOf], words: Words) -> list[str]:
    """What each act takes here and there, where something is known of there; then the values that would flip it."""
    lines = []
    for case in cases:
        for trial in case.trials:
            if trial.seconds is None:
                continue
            told = words.text(
                "takes",
                here=_duration(case.seconds, words),
                there=_duration(trial.seconds, words),
                chip_hours_here=_chip_hours(case.chip_hours, words),
                chip_hours_there=_chip_hours(trial.chip_hours, words),
                money_here=_money(case.money, words),
                money_there=_money(trial.money, words),
            )
            lines.append(words.text("compared", act=numbers.capital(words.term("act", case.kind)), told=told))
        if case.flips:
            flips = [
                words.text("flip", what=words.term("flip_of", one.what), value=_money(one.at, words))
                for one in case.flips
            ]
            lines.append(words.text("flips", flips=words.text("separator").join(flips)))
    return lines


def _flips(case: CaseOf, words: Words) -> list[str]:
    found = ((words.term("flip_of", one.what), _money(one.at, words)) for one in case.flips)
    return [words.text("flip", what=what, value=value) for what, value in found]


def _again(case: CaseOf, record: JustifyRecord, words: Words) -> str:
    if case.look_again is None:
        return words.text("again_open")
    key = "again_past" if record.as_of and case.look_again < record.as_of else "again"
    return words.text(key, day=case.look_again, record=case.because)


def _buyers(record: JustifyRecord, words: Words) -> list[str]:
    asked = {(one.buyer_parent, one.site) for one in (record.rulings or {}).values()}
    return [
        words.text("buyer", parent=words.name("country", parent), site=words.name("country", site))
        for parent, site in sorted(asked)
    ]


def _notice(record: JustifyRecord, words: Words) -> str:
    ends = {one.records_end for one in (record.rulings or {}).values()}
    return words.text("notice", as_of=record.as_of, end=max(ends)) if ends else ""


def _crossed(record: JustifyRecord, words: Words) -> str:
    gate = record.gate
    if gate is None:
        return ""
    cautions = words.text("cautions", count=gate.outcomes["caution"]) if gate.outcomes.get("caution") else ""
    key = "crossed" if gate.verdict == "pass" else "not_crossed"
    return words.text(key, held=gate.held, checks=gate.checks, cautions=cautions)


def _accuracy(record: JustifyRecord, words: Words) -> str:
    figure = record.gate.accuracy if record.gate else None
    if figure is None or figure.value is None:
        return ""
    told = words.text(
        "accuracy",
        value=_points(figure, figure.value),
        interval=_interval(figure, words, _points),
        kind=words.term("kind", figure.kind),
    )
    if figure.low is None or figure.high is None:
        return told
    lost = (
        words.text("lost") if figure.high < 0 else words.text("not_lost", most=_points(figure, -figure.low).lstrip("+"))
    )
    return f"{told} {lost}" if figure.low < 0 else told


def _points(figure: Figure, end: float) -> str:
    return numbers.fine_points(100 * end if figure.unit in numbers.SHARE_UNITS else end)


def _seal(record: JustifyRecord, words: Words) -> str:
    gate = record.gate
    if gate is None or gate.seal_id is None:
        return words.text("no_seal")
    if gate.signer is None:
        return words.text("seal_unsigned", seal=gate.seal_id)
    return words.text("seal", seal=gate.seal_id, key=gate.signer)


def _interval(
    figure: Figure, words: Words, shown: Callable[[Figure, float], str] = lambda _, end: _written(end)
) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return words.text("interval", low=shown(figure, figure.low), high=shown(figure, figure.high))


def _duration(figure: Figure | None, words: Words) -> str:
    if figure is None or figure.value is None:
        return words.text("not_known")
    interval = _interval(figure, words, lambda _, end: numbers.duration(end))
    return f"{numbers.duration(figure.value)}{interval} ({words.term('kind', figure.kind)})"


def _chip_hours(figure: Figure | None, words: Words) -> str:
    if figure is None or figure.value is None:
        return words.text("not_known")
    return f"{_written(figure.value)}{_interval(figure, words)} ({words.term('kind', figure.kind)})"


def _money(figure: Figure | None, words: Words) -> str:
    if figure is None or figure.value is None:
        return words.text("not_given")
    value = f"{_written(figure.value)}{_interval(figure, words)} {figure.unit}".strip()
    return f"{value} ({words.term('kind', figure.kind)})"


def _page_file(name: str) -> Any:
    return (resources.files("isthmus.report_page.justify") / name).read_text(encoding="utf-8")
