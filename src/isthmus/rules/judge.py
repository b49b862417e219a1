"""One chip, one buyer, one place and one day against the records of that day."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatch
from typing import Literal

from isthmus.chips import Chip, get_chip
from isthmus.chips.trade import Effect, TradeFacts, TradeRecord, trade_facts
from isthmus.records import RuleAnswer, RuleFinding, Ruling
from isthmus.rules.conditions import any_holds, every
from isthmus.rules.countries import country
from isthmus.rules.numbers import Numbers, numbers_of

BELOW, UNKNOWN, UNDEFINED = "below 3A090", "unknown", "no class yet"
WINDOW = "us-2026-01-window"
_ANSWERS: dict[Effect, RuleAnswer] = {
    "note": "nothing found",
    "caution": "caution",
    "licence": "licence",
    "denial": "refused",
}
SEVERITY: tuple[RuleAnswer, ...] = ("nothing found", "caution", "unknown", "licence", "refused")


@dataclass(frozen=True)
class Buyer:
    """Who buys, and where the chips stand: countries by two letters. `count` and `state_funded` None: not said."""

    parent: str
    site: str
    count: int | None = None
    state_funded: bool | None = None

    def checked(self) -> Buyer:
        """The same with codes in capitals; raises IsthmusError for one that is no country's."""
        return dataclasses.replace(self, parent=country(self.parent, "buyer_parent"), site=country(self.site, "site"))


def judge(slug: str, buyer: Buyer, as_of: date, licence: str | None = None) -> Ruling:
    """What the records of a day say. Raises IsthmusError for an unknown chip or country."""
    facts, buyer = trade_facts(), buyer.checked()
    chip = get_chip(facts.machines.get(slug, slug))
    maker, numbers = facts.makers.get(chip.vendor), numbers_of(chip)
    klass = export_class(numbers, as_of)
    case = _Case(chip, maker, numbers, klass, buyer, facts)
    findings = _relaxed([found for record in facts.records if (found := case.finding(record, as_of))]) if maker else []
    return Ruling(
        chip=slug,
        maker=maker,
        as_of=as_of,
        records_end=facts.ends,
        buyer_parent=buyer.parent,
        site=buyer.site,
        count=buyer.count,
        state_funded=buyer.state_funded,
        export_class=machine_class(klass) if slug in facts.machines else klass,
        window=window(numbers, klass, maker, as_of),
        steps=list(numbers.steps),
        findings=findings,
        answer=_answer(findings, maker),
        licence=licence,
    )


def export_class(numbers: Numbers, as_of: date) -> str:
    """The class of a chip by its numbers, in the words of the rules of a day; "unknown" where they do not tell,
    "no class yet" before the first rule."""
    in_force = [one for one in trade_facts().classes if one.holds_on(as_of)]
    if not in_force:
        return UNDEFINED
    for one in in_force:
        holds = any_holds(one.any_of, numbers.amounts)
        if holds is None:
            return UNKNOWN
        if holds:
            return one.name
    return BELOW


def machine_class(klass: str) -> str:
    """The class of a machine by that of the chips in it (ECCN 4A090)."""
    return klass.replace("3A090", "4A090")


def window(
    numbers: Numbers, klass: str, maker: str | None, as_of: date
) -> Literal["inside", "outside", "unknown", "none"]:
    """Whether a chip lies in the window of January 2026; "none" before that day, and for chips it is not about."""
    record = next(one for one in trade_facts().records if one.id == WINDOW)
    if not record.holds_on(as_of) or maker not in record.makers or klass not in (*record.classes, UNKNOWN):
        return "none"
    inside = any_holds(record.any_of, numbers.amounts)
    return "unknown" if inside is None or klass == UNKNOWN else "inside" if inside else "outside"


@dataclass(frozen=True)
class _Case:
    chip: Chip
    maker: str | None
    numbers: Numbers
    klass: str
    buyer: Buyer
    facts: TradeFacts

    def finding(self, record: TradeRecord, as_of: date) -> RuleFinding | None:
        """The record if it was in force and applies, or may apply."""
        if not record.holds_on(as_of) or (applies := self._applies(record)) is False:
            return None
        effect, why = record.effect, self._why(record)
        exceeded = record.cap is not None and self.buyer.count is not None and self.buyer.count > record.cap
        if exceeded:
            effect, why = "caution", f"{why}; {self.buyer.count:,} is above the cap of {record.cap:,}"
        return RuleFinding(
            record=record.id,
            side=record.side,
            kind=record.kind,
            effect=effect,
            since=record.since,
            day_known=record.day_known,
            as_of=record.as_of,
            expires=record.expires,
            stale=as_of > record.expires,
            certain=applies is True,
            cap=record.cap if exceeded else None,
            what=record.what,
            what_zh=record.what_zh,
            why=why,
            source=record.source,
        )

    def _applies(self, record: TradeRecord) -> bool | None:
        return every(
            (
                self._made_in(record),
                self._named(record),
                self._is_in(self.buyer.parent, record.parents, record.not_parents),
                self._is_in(self.buyer.site, record.sites, record.not_sites),
                self._has_class(record),
                record.memory is None or fnmatch(self.chip.texts.get("mem_type", ""), record.memory),
                self._is_funded(record),
                any_holds(record.any_of, self.numbers.amounts),
            )
        )

    def _made_in(self, record: TradeRecord) -> bool:
        return not record.makers or self.maker in record.makers

    def _named(self, record: TradeRecord) -> bool:
        listed = not record.chips or any(fnmatch(self.chip.slug, pattern) for pattern in record.chips)
        return listed and not any(fnmatch(self.chip.slug, pattern) for pattern in record.not_chips)

    def _is_in(self, code: str, wanted: tuple[str, ...], unwanted: tuple[str, ...]) -> bool:
        return (not wanted or code in self.facts.countries(wanted)) and code not in self.facts.countries(unwanted)

    def _has_class(self, record: TradeRecord) -> bool | None:
        if not record.classes or self.klass in record.classes:
            return True
        return None if self.klass == UNKNOWN else False

    def _is_funded(self, record: TradeRecord) -> bool | None:
        if record.state_funded is None:
            return True
        return None if self.buyer.state_funded is None else self.buyer.state_funded == record.state_funded

    def _why(self, record: TradeRecord) -> str:
        parts = [f"chip {self.chip.slug} is named" if record.chips else ""]
        parts.append(f"its class is {self.klass}" if record.classes else "")
        parts += [one for one in record.any_of if any_holds((one,), self.numbers.amounts) is not False]
        parts.append(f"parent {self.buyer.parent}" if record.parents or record.not_parents else "")
        parts.append(f"site {self.buyer.site}" if record.sites or record.not_sites else "")
        if record.state_funded is not None:
            said = "not said" if self.buyer.state_funded is None else "yes" if self.buyer.state_funded else "no"
            parts.append(f"state money: {said}")
        if record.makers:
            parts.append(f"made by a firm of {self.maker}")
        return ", ".join(part for part in parts if part)


def _relaxed(findings: Sequence[RuleFinding]) -> list[RuleFinding]:
    """A denial becomes a licence where a record that certainly applies relaxes it."""
    certain = {found.record for found in findings if found.certain}
    relaxing = {old: one.id for one in trade_facts().records if one.id in certain for old in one.relaxes}
    return [
        found.model_copy(update={"effect": "licence", "why": f"{found.why}; relaxed by {relaxing[found.record]}"})
        if found.record in relaxing and found.effect == "denial"
        else found
        for found in findings
    ]


def _answer(findings: Sequence[RuleFinding], maker: str | None) -> RuleAnswer:
    answers: list[RuleAnswer] = ["nothing found", *(_ANSWERS[found.effect] for found in findings if found.certain)]
    open_questions = [found for found in findings if not found.certain and found.effect in ("licence", "denial")]
    if open_questions or maker is None:
        answers.append("unknown")
    if any(not found.certain and found.effect == "caution" for found in findings):
        answers.append("caution")
    return max(answers, key=lambda one: SEVERITY.index(one))
