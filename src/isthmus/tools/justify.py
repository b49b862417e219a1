"""`isthmus justify`: the paper for an authority or a board, in two languages from one record."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.errors import IsthmusError
from isthmus.progress import Watch
from isthmus.report_page.justify.gather import gather
from isthmus.report_page.justify.record import JustifyRecord
from isthmus.report_page.justify.words import LANGUAGES, Language
from isthmus.report_page.justify.write import write
from isthmus.rules.countries import country
from isthmus.run import RunFolder

NAME = "justify"


def execute(
    run: RunFolder, watch: Watch, *, languages: Sequence[Language] = LANGUAGES, authority: str | None = None
) -> JustifyRecord:
    """Write `justify.json`, and `justify-LANGUAGE.html` for each language, into the run folder.

    `authority` is the country whose chips count as domestic; that of the buyer's parent if absent. Raises IsthmusError
    if neither says it, and if the run has no plan; DamagedFile if a file of the run was touched.
    """
    asked = authority or (run.recipe.rules.buyer_parent if run.recipe.rules else None)
    if asked is None:
        raise IsthmusError(
            "who asks? Write --authority CC, the country whose chips are the domestic ones, such as CN; or [rules] "
            "buyer_parent in the recipe"
        )
    run.check_untouched("no paper is made of it")
    record = gather(run, country(asked, "authority"))
    run.write_record(NAME, record)
    for language in languages:
        path = run.path / f"{NAME}-{language}.html"
        run.keep(path, write(record, language).encode(), record.made_from)
        watch.say(f"The justification of this run: {path}")
    return record
