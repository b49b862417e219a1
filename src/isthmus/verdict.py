"""What evidence amounts to: three scores, a verdict, and the limits within which it holds.

A failing finding that its limits describe completely leaves a pool fit within them. What is unknown never counts as
passed. Nothing here loads torch: the plan and the dossier judge as the qualification does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from isthmus.chips import device_of, looked_for
from isthmus.pools import Pool, get_pool
from isthmus.recipe.practice import rollout_formats
from isthmus.recipe.schema import Recipe
from isthmus.records import Aspect, AspectOutcome, Evidence, Limit, QualifyRecord, Score, Skipped, Verdict
from isthmus.run import Figure

QUESTIONS: tuple[Aspect, ...] = ("stability", "links", "software")
"""What a pool can fail by: the three things that nobody measured in time when training runs were lost."""
PAIR_OF_RANKS = re.compile(r"p2p_(\d+)_(\d+)_gbs")
RANKS = "pool.ranks"
ROLLOUT_FORMAT = "rollout_format"
"""The setting of a limit on the format of samples, in whichever step they are made."""
_WORST_FIRST: tuple[AspectOutcome, ...] = ("fail", "unknown", "limited", "pass")


def judge(evidence: Sequence[Evidence]) -> Verdict:
    """The verdict that the evidence allows: serving is judged first, and a failure weighs more than what is unknown."""
    serving = outcome_of(item for item in evidence if item.needed_for in ("serving", "both"))
    if serving == "fail":
        return "unfit"
    if serving == "unknown":
        return "not enough evidence"
    training = outcome_of(evidence)
    if training in ("fail", "unknown"):
        return "serve-only"
    return "fit" if training == "pass" else "fit with limits"


def outcome_of(evidence: Iterable[Evidence]) -> AspectOutcome:
    """The worst of the findings; `unknown` if there is none. A failure with limits counts as `limited`."""
    found = [_outcome(item) for item in evidence]
    for outcome in _WORST_FIRST:
        if outcome in found:
            return outcome
    return "unknown"


def _outcome(item: Evidence) -> AspectOutcome:
    return "limited" if item.outcome == "fail" and item.limits else item.outcome


def scores(
    evidence: Sequence[Evidence], looked: Iterable[tuple[Aspect, str]], skipped: Sequence[Skipped]
) -> list[Score]:
    """One score for each question. `looked` are the pairs of aspect and kind of fault that probes looked for."""
    pairs = list(looked)
    found = []
    for aspect in QUESTIONS:
        findings = [item for item in evidence if item.aspect == aspect]
        found.append(
            Score(
                aspect=aspect,
                outcome=outcome_of(findings),
                passed=sum(item.outcome == "pass" for item in findings),
                findings=len(findings),
                looked_for=looked_for(aspect, (kind for one, kind in pairs if one == aspect)),
                skipped=sum(item.aspect == aspect for item in skipped),
            )
        )
    return found


def limits_of(evidence: Iterable[Evidence]) -> list[Limit]:
    """All limits of these findings, each once."""
    return list({limit.model_dump_json(): limit for item in evidence for limit in item.limits}.values())


def broken_limits(limits: Iterable[Limit], recipe: Recipe, pool_name: str, use: str) -> list[str]:
    """In words, which limits of a pool the recipe does not keep to in a use, "training" or "serving"."""
    pool = get_pool(recipe, pool_name)
    binding = [limit for limit in limits if limit.needed_for in (use, "both")]
    problems = [_bad_ranks([limit for limit in binding if limit.setting == RANKS and limit.excluded], pool)]
    problems += [_problem(limit, recipe, pool) for limit in binding if limit.setting != RANKS]
    return [problem for problem in problems if problem is not None]


def _bad_ranks(limits: Sequence[Limit], pool: Pool) -> str | None:
    """What to do about ranks that are not to be used, all findings about them taken together."""
    bad = sorted({rank for limit in limits for rank in limit.excluded})
    if not bad:
        return None
    good, reasons = pool.ranks - len(bad), "; ".join(dict.fromkeys(limit.reason for limit in limits))
    if good < 1:
        return f"none of its ranks is good: {reasons}"
    key = "count" if pool.ranks == pool.count else "ranks"
    return f"rank {', '.join(bad)} is not to be used ({reasons}): take out what it computes on, and set {key} = {good}"


def _problem(limit: Limit, recipe: Recipe, pool: Pool) -> str | None:
    value = setting_value(recipe, pool, limit.setting)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if limit.most is not None and value > limit.most:
            return f"{limit.setting} is {value:g}, and {limit.most:g} is the most ({limit.reason})"
        if limit.least is not None and value < limit.least:
            return f"{limit.setting} is {value:g}, and {limit.least:g} is the least ({limit.reason})"
    for one in value if isinstance(value, list) else [value]:
        written = str(one).lower() if isinstance(one, bool) else str(one)
        if written in limit.excluded:
            return f"{limit.setting} is {written}, which is excluded ({limit.reason})"
    return None


def setting_value(recipe: Recipe, pool: Pool, setting: str) -> object:
    """What a setting such as `train.expert` or `pool.count` is in a recipe. Raises KeyError for one that there is not.

    The precision of training, where the recipe leaves it open, is what `train` would choose on this pool.
    """
    if setting == "train.precision":
        return recipe.train.precision_on(device_of(pool))
    if setting == ROLLOUT_FORMAT:
        return rollout_formats(recipe)
    section, _, key = setting.partition(".")
    holder = pool if section == "pool" else getattr(recipe, section, None)
    for name in key.split("."):
        if holder is None or not hasattr(holder, name):
            raise KeyError(f"a limit is about {setting}, which is not a key of a recipe")
        holder = getattr(holder, name)
    return holder


def compare(records: Sequence[QualifyRecord]) -> list[tuple[str, list[str]]]:
    """Rows of a table of pools side by side: what the row is about, then a text for each record."""
    rows = [("verdict", [record.verdict for record in records]), ("chip", [record.chip for record in records])]
    rows.append(("evidence", ["rehearsed" if record.rehearsed else "measured" for record in records]))
    for aspect in QUESTIONS:
        rows.append((aspect, [_score_text(record, aspect) for record in records]))
    rows.append(("limits", ["; ".join(map(describe_limit, record.limits)) or "none" for record in records]))
    for name, figures in shared_figures(records).items():
        rows.append((name, ["not known" if figure is None else str(figure) for figure in figures]))
    return rows


def shared_figures(records: Sequence[QualifyRecord]) -> dict[str, list[Figure | None]]:
    """The figures that at least two of the records have, each with an entry per record; not those of pairs of ranks."""
    known = [without_pairs(all_figures(record)) for record in records]
    names = dict.fromkeys(name for figures in known for name in figures)
    rows = {name: [figures.get(name) for figures in known] for name in names}
    return {name: row for name, row in rows.items() if sum(figure is not None for figure in row) > 1}


def without_pairs(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """The figures that are not of one pair of ranks."""
    return {name: figure for name, figure in figures.items() if not PAIR_OF_RANKS.fullmatch(name)}


def all_figures(record: QualifyRecord) -> dict[str, Figure]:
    """The figures of a record and of its findings, by name; of two with one name the record's own."""
    own = {name: figure for item in record.evidence for name, figure in item.figures.items()}
    return own | record.figures


def _score_text(record: QualifyRecord, aspect: Aspect) -> str:
    score = next((one for one in record.scores if one.aspect == aspect), None)
    if score is None:
        return "not judged"
    return f"{score.outcome}, {score.passed} of {score.findings} findings pass, {score.looked_for:.0%} looked for"


def describe_limit(limit: Limit) -> str:
    """A limit in a few words, such as `train.expert <= 8`."""
    parts = [f"{limit.setting} >= {limit.least:g}"] if limit.least is not None else []
    parts += [f"{limit.setting} <= {limit.most:g}"] if limit.most is not None else []
    parts += [f"{limit.setting} not {' or '.join(limit.excluded)}"] if limit.excluded else []
    return " and ".join(parts)
