"""The gate: how a figure is held against its limit, what refuses, and how it is told.

The hand-off, `isthmus verify`, `isthmus inspect` and the canary judge by it. Nothing is sealed that was not shown to
pass: a check that could not conclude refuses as one that failed does. A caution is no measurement: it says what is
known to go wrong elsewhere, is shown with the others, and refuses nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy.special import ndtri, stdtrit

from isthmus import __version__
from isthmus.parity.limits import FEWEST_SAMPLES as FEWEST_SAMPLES
from isthmus.parity.limits import at_least as at_least
from isthmus.parity.limits import at_most as at_most
from isthmus.parity.tokens import TokenParity
from isthmus.records import Check, CheckOutcome, LedgerRow, ParityVerdict
from isthmus.run import Figure

STYLES: dict[str, str] = {
    "pass": "green",
    "caution": "yellow",
    "fail": "bold red",
    "unknown": "bold yellow",
    "refuse": "bold red",
}
_MEANS: dict[CheckOutcome, str] = {
    "caution": "caution: known to go wrong elsewhere, or not looked at; it refuses nothing",
    "unknown": "unknown: not enough was seen to tell; a doubt refuses, and more golden prompts may settle it",
}
COST = "what the format costs, KL to the trained model"
_AGAINST_LIMIT: dict[CheckOutcome, str] = {"fail": "outside", "unknown": "not shown to be within"}


def reach(
    value: float, interval: tuple[float, float] | None, samples: int, confidence: float
) -> tuple[float, float] | None:
    """How far a mean may lie by a bootstrap interval of few samples, which is too narrow by itself.

    Wider by sqrt(n / (n - 1)) t(n - 1) / z, as in the expanded percentile interval (Hesterberg 2015, The American
    Statistician 69, 371-386): 9.2 times for two samples, 1.3 for eight, 1.03 for 64. None for fewer than two.
    """
    if interval is None or samples < FEWEST_SAMPLES:
        return None
    tail = (1 + confidence) / 2
    factor = math.sqrt(samples / (samples - 1)) * float(stdtrit(samples - 1, tail) / ndtri(tail))
    return value - factor * (value - interval[0]), value + factor * (interval[1] - value)


def finite(
    value: float, unit: str, source: str, *, rehearsed: bool, interval: tuple[float, float] | None = None
) -> Figure | None:
    """The figure that was measured; None if it is no number."""
    if not all(map(math.isfinite, (value, *(interval or ())))):
        return None
    low, high = interval or (None, None)
    return Figure.measured(value, unit, source, rehearsed=rehearsed, low=low, high=high)


def declared(value: float, unit: str, source: str) -> Figure:
    """A limit, and where it stands."""
    return Figure(value=value, unit=unit, kind="declared", source=source)


def check_kl(
    name: str,
    found: TokenParity,
    limit: Figure,
    source: str,
    detail: str,
    *,
    rehearsed: bool,
    confidence: float = 0.95,
) -> Check:
    """Whether the mean KL of golden sequences is within its limit, by its interval over the sequences.

    The interval that is shown is the bootstrap's; the limit is held against its `reach`, so that few sequences, or the
    same one several times, have to lie well below it.
    """
    assert limit.value is not None
    return Check(
        layer="tokens",
        name=name,
        outcome=at_most(
            limit.value,
            found.mean_kl,
            reach(found.mean_kl, found.kl_interval, found.distinct, confidence),
            samples=found.distinct,
        ),
        figure=finite(found.mean_kl, "nats/token", source, rehearsed=rehearsed, interval=found.kl_interval),
        limit=limit,
        detail=detail,
    )


def check_top1(name: str, found: TokenParity, least: float, of_least: str, source: str, *, rehearsed: bool) -> Check:
    """Whether the share of first choices that agree reaches `least`, whose source is `of_least`."""
    return Check(
        layer="tokens",
        name=name,
        outcome=at_least(least, found.top1_agreement, samples=found.distinct),
        figure=finite(100 * found.top1_agreement, "%", source, rehearsed=rehearsed),
        limit=declared(100 * least, "%", of_least),
        detail=f"of the first choices that differ, {found.near_ties} are near-ties of the reference, {found.flips} are "
        f"not; {found.router_flips} of {found.router_choices} router choices differ",
    )


def refuses(check: Check) -> bool:
    """Whether a bundle with this finding must not be sealed, whatever its layer."""
    return check.outcome in ("fail", "unknown")


def shows_enough(checks: Iterable[Check]) -> bool:
    """Whether something was shown and nothing refuses: cautions alone, or no check at all, vouch for nothing."""
    listed = list(checks)
    return any(check.outcome == "pass" for check in listed) and not any(map(refuses, listed))


def unmeasured(said: ParityVerdict | None, checks: Sequence[Check], layers: Collection[str]) -> list[Check]:
    """What an earlier verdict refused and `checks` did not look at again: other layers than `layers`, other names."""
    asked = {(check.layer, check.name) for check in checks}
    left = [
        check
        for check in (said.checks if said else ())
        if refuses(check) and check.layer not in layers and (check.layer, check.name) not in asked
    ]
    where = said.target if said else ""
    return [one.model_copy(update={"detail": f"{one.detail} (found on {where}, not looked at again)"}) for one in left]


def judge(
    *findings: Sequence[Check], target: str, rehearsed: bool, ledger: Sequence[LedgerRow] = (), started: float
) -> ParityVerdict:
    """The verdict on all findings of a bundle: it passes if something was shown, and nothing refuses.

    The culprit is the module of the first refusing check that names one.
    """
    checks = [*chain(*findings)]
    refusing = [*filter(refuses, checks)]
    named = next((check for check in refusing if check.module), None)
    return ParityVerdict(
        verdict="pass" if shows_enough(checks) else "refuse",
        target=target,
        rehearsed=rehearsed,
        checks=checks,
        ledger=list(ledger),
        culprit=named.module if named else None,
        operator=named.operator if named else None,
        isthmus=__version__,
        torch=torch.__version__,
        started=started,
        ended=time.time(),
    )


def refusal(opening: str, checks: Iterable[Check], culprit: str | None = None, operator: str | None = None) -> str:
    """Why, in words: every check that refuses with what it found, and where the fault is."""
    lines = [opening]
    for check in filter(refuses, checks):
        against = f"is {_AGAINST_LIMIT[check.outcome]} the limit {check.limit}; "
        found = f"{check.figure} {against}" if check.figure and check.limit else ""
        lines.append(f"  {check.name}: {found}{check.detail}")
    if culprit:
        lines.append(f"The fault is in {culprit}{f', operator {operator}' if operator else ''}.")
    return "\n".join(lines)


def shown(check: Check) -> dict[str, str | None]:
    """A check as a row of a table: what was found, of which limit, and the detail where it did not pass."""
    figures = " of ".join(str(figure) for figure in (check.figure, check.limit) if figure is not None)
    found = figures or check.detail
    if figures and check.outcome != "pass" and check.detail:
        found = f"{figures}; {check.detail}"
    return {"layer": check.layer, "name": check.name, "outcome": check.outcome, "found": found, "module": check.module}


def check_list(title: str, rows: Iterable[Mapping[str, str | None]]) -> RenderableType:
    """All findings for a person, each as `shown` gives it, within any width."""
    return Group(Text(title, style="bold"), _lines(rows))


def check_summary(title: str, checks: Sequence[Check], bundle: str) -> RenderableType:
    """A few lines for a person: what it cost, how many checks of each layer passed, and every one that did not.

    `isthmus inspect` shows them all, of the folder that `bundle` names.
    """
    cost = [check for check in checks if check.outcome == "pass" and check.name.endswith(COST)]
    told = [*cost, *(check for check in checks if check.outcome != "pass")]
    passed = Counter(check.layer for check in checks if check.outcome == "pass")
    count = ", ".join(f"{number} of {layer}" for layer, number in passed.items())
    hints = [text for outcome, text in _MEANS.items() if any(check.outcome == outcome for check in told)]
    return Group(
        Text(title, style="bold"),
        Text.assemble(("  pass", STYLES["pass"]), f"     {count}" if count else "     nothing"),
        _lines(map(shown, told)),
        *(Text(f"  {text}", style="dim") for text in hints),
        Text(f"  all of it: isthmus inspect {bundle}", style="dim"),
    )


def _lines(rows: Iterable[Mapping[str, str | None]]) -> Table:
    """A row per finding: its outcome and its layer, then its name with what was found below."""
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        outcome, name = row.get("outcome") or "", row.get("name") or ""
        where = f"\nin {module}" if (module := row.get("module")) else ""
        text = Text.assemble((name, "bold"), f"\n{row.get('found') or ''}{where}")
        table.add_row(Text(f"  {outcome}", style=STYLES.get(outcome, "")), row.get("layer") or "", text)
    return table


def ledger_table(rows: Iterable[LedgerRow]) -> Table:
    """Rows of the error ledger for a person."""
    table = Table(title="error ledger, the costliest blocks", title_justify="left")
    table.add_column("block", no_wrap=True)
    for column in ("kind", "quantised", "chip", "its floor"):
        table.add_column(column)
    for row in rows:
        costs = (row.quantisation, row.chip, row.floor)
        table.add_row(row.module, row.kind, *("-" if cost is None else f"{100 * cost:.3g} %" for cost in costs))
    return table
