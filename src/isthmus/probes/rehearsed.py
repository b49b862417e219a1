"""What the tables of a chip that is not here say of a run: operators, collectives, and what only it can show."""

from __future__ import annotations

from isthmus.chips import get_chip
from isthmus.chips.rehearse import Profile, RehearsalRefused
from isthmus.probes.findings import Findings
from isthmus.probes.static.check import static_findings
from isthmus.run import Figure, RunFolder

COLLECTIVES = (("all_reduce", "sum"), ("all_gather", None), ("broadcast", None))


def operators(found: Findings, profile: Profile, run: RunFolder) -> None:
    """This run's own work at full size, joined with the tables of the chip."""
    for item in static_findings(found.recipe, get_chip(found.pool.chip), profile, ranks=found.pool.ranks):
        if (operators := item.figures.get("fallback_operators")) and operators.value:
            run.event("qualify", "fallback", what=f"{item.name} on {found.pool}", why=item.detail)
        found.evidence.append(item)
        found.figures |= {name: figure for name, figure in item.figures.items() if name not in found.figures}


def collectives(found: Findings, profile: Profile) -> None:
    """What the chip's collective library makes of the collectives that data-parallel training in fp32 uses."""
    try:
        differences = [profile.check_collective(name, "float32", reduction) for name, reduction in COLLECTIVES]
    except RehearsalRefused as refusal:
        found.add("collective rules", "links", "training", "fail", str(refusal))
        return
    notes = [note for differing in differences for note in differing] + list(profile.timeouts())
    allowed = f"{', '.join(name for name, _ in COLLECTIVES)} of float32 are allowed"
    found.add("collective rules", "links", "training", "pass", "; ".join([allowed, *notes]), len(COLLECTIVES))


def only_the_chip_can_tell(found: Findings) -> None:
    """What stays unknown in a rehearsal, with what is declared about it."""
    chip = get_chip(found.pool.chip)
    detail = "only the chip itself can show it, and it is not here"
    links = _known(declared_link=chip.scaleup_gbs_uni, declared_network=chip.nic_gbs_uni)
    rates = _known(declared_peak=chip.bf16_tflops, declared_memory=chip.mem_bw_gbs)
    found.add("stability over time", "stability", "training", "unknown", detail)
    found.add("speed of links", "links", "training", "unknown", detail, figures=links)
    found.add("rates", "compute", "training", "unknown", detail, figures=rates)


def _known(**figures: Figure | None) -> dict[str, Figure]:
    return {name: figure for name, figure in figures.items() if figure is not None}
