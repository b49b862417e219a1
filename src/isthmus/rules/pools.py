"""The pools of a recipe against the records, and what that means for placing a stage on them."""

from __future__ import annotations

from isthmus.pools import placed_pools
from isthmus.recipe.schema import Recipe
from isthmus.records import RuleFinding, Ruling
from isthmus.rules.judge import Buyer, judge

NOT_LOOKED_AT = "rules were not looked at: the recipe has no [rules], which says who buys, where, and as of which day"


def rule_pools(recipe: Recipe) -> dict[str, Ruling] | None:
    """A ruling for each placed pool; None if the recipe has no [rules]. Raises IsthmusError for an unknown country."""
    rules = recipe.rules
    if rules is None:
        return None
    return {
        pool.name: judge(
            pool.chip,
            Buyer(rules.buyer_parent, rules.sites.get(pool.name, rules.site), pool.count, rules.state_funded),
            rules.as_of,
            licence=rules.licences.get(pool.name),
        )
        for pool in placed_pools(recipe)
    }


def refusal(ruling: Ruling | None) -> str | None:
    """Why nothing may be placed on the pool; None if it may, or where the buyer says to hold a licence."""
    if ruling is None or ruling.answer != "refused" or ruling.licence:
        return None
    found = strictest(ruling)
    return (
        f"as of {ruling.as_of} a rule forbids it: {ruling.chip} is {ruling.export_class}, for a parent in "
        f"{ruling.buyer_parent} at {ruling.site} ({found[0].record}: a licence is needed, and the policy is denial). "
        "Who holds a licence names it in rules.licences"
    )


def warning(ruling: Ruling | None) -> str | None:
    """What has to be settled before the pool is bought or used; None if the records ask for nothing."""
    if ruling is None or ruling.answer == "nothing found":
        return None
    if ruling.answer == "unknown":
        return f"the records cannot tell what binds {ruling.chip}: its class is {ruling.export_class}"
    named = ", ".join(found.record for found in strictest(ruling))
    if ruling.answer == "caution":
        return f"the records of {ruling.as_of} ask for care ({named})"
    held = f"; the buyer names {ruling.licence!r}, which is not checked" if ruling.licence else ""
    return f"it needs a licence or an authorisation as of {ruling.as_of} ({named}){held}"


def strictest(ruling: Ruling) -> list[RuleFinding]:
    """The findings that make the answer what it is."""
    effects = {"refused": "denial", "licence": "licence", "caution": "caution"}
    return [found for found in ruling.findings if found.certain and found.effect == effects.get(ruling.answer)]


def notice(ruling: Ruling) -> str:
    """What a reader must not take a ruling for."""
    gap = (ruling.as_of - ruling.records_end).days
    blank = f" Of the {gap} days after that nothing is known here." if gap > 0 else ""
    return (
        f"As of {ruling.as_of}, from records that end on {ruling.records_end}.{blank} It is not current, and it is not "
        "legal advice."
    )
