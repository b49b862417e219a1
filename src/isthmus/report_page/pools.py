"""Pools beside each other, and the pairs of ranks within one, as the dossier shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.records import Aspect, QualifyRecord, Score
from isthmus.run import Figure, Kind
from isthmus.verdict import PAIR_OF_RANKS, QUESTIONS, shared_figures


@dataclass(frozen=True)
class SideBySide:
    """Several pools. Each list has an entry per record; None where a pool has nothing to show."""

    records: list[QualifyRecord]
    scores: dict[str, list[Score | None]]
    figures: dict[str, list[Figure | None]]


@dataclass(frozen=True)
class PairRates:
    """GB/s between ranks: `rows[i][j]` from `ranks[i]` to `ranks[j]`, None on the diagonal and where not measured."""

    ranks: list[int]
    rows: list[list[float | int | None]]
    kind: Kind


def side_by_side(records: Sequence[QualifyRecord | None]) -> SideBySide | None:
    """The pools that have a verdict, with the figures that at least two of them have; None for fewer than two pools."""
    known = [record for record in records if record is not None]
    if len(known) < 2:
        return None
    scores = {aspect: [_score(record, aspect) for record in known] for aspect in QUESTIONS}
    return SideBySide(known, scores, shared_figures(known))


def _score(record: QualifyRecord, aspect: Aspect) -> Score | None:
    return next((score for score in record.scores if score.aspect == aspect), None)


def pair_rates(figures: Mapping[str, Figure]) -> PairRates | None:
    """The matrix of pairs among the figures of a finding; None if there is none."""
    found = [(PAIR_OF_RANKS.fullmatch(name), figure) for name, figure in figures.items()]
    pairs = {(int(match[1]), int(match[2])): figure for match, figure in found if match}
    if not pairs:
        return None
    ranks = sorted({rank for pair in pairs for rank in pair})
    rows = [[pairs[a, b].value if (a, b) in pairs else None for b in ranks] for a in ranks]
    return PairRates(ranks, rows, next(iter(pairs.values())).kind)
