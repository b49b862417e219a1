"""What the tables of a chip that is not here say of a run: operators, collectives, and what only it can show."""

from __future__ import annotations

from isthmus.chips import get_chip
from isthmus.chips.rehearse import Profile, RehearsalRefused
from isthmus.probes.findings import Findings
from isthmus.probes.operators import Coverage, coverage, trace_operators
from isthmus.probes.workload import Workload
from isthmus.records import Outcome, Use
from isthmus.run import Figure, RunFolder

COLLECTIVES = (("all_reduce", "sum"), ("all_gather", None), ("broadcast", None))


def operators(found: Findings, work: Workload, profile: Profile, run: RunFolder) -> None:
    """This run's own work in small, joined with the chip's operator table."""
    batch = work.batch(0)
    serving = coverage(trace_operators(work.generate), profile)
    training = coverage(trace_operators(lambda: (work.sft_step(0, batch), work.learn(batch))), profile)
    _covered(found, run, "operators of serving", "serving", serving)
    _covered(found, run, "operators of training", "training", training)


def _covered(found: Findings, run: RunFolder, name: str, needed_for: Use, seen: Coverage) -> None:
    """Operators that fall back to the host fail training, where every step would wait for them."""
    missing, fallback, unlisted = (seen.operators[status] for status in ("none", "fallback", "unknown"))
    for operator in fallback:
        run.event("qualify", "fallback", what=f"{operator} on {found.pool}", why="the host's CPU runs it, silently")
    bad = {"missing": missing, "on the host's CPU": fallback, "not in the table": unlisted}
    bad |= {f"with {dtype}, which the chip refuses": names for dtype, names in seen.refused_dtypes.items()}
    bad |= {f"with {dtype}, with which the chip is weak": names for dtype, names in seen.weak_dtypes.items()}
    failed = missing or seen.refused_dtypes or (fallback and needed_for == "training")
    outcome: Outcome = "fail" if failed else "unknown" if unlisted else "pass"
    made = seen.count("generic") + seen.count("decomposes")
    detail = f"{seen.total} operators: {seen.count('native')} native, {made} made of others"
    detail += "".join(f", {len(names)} {what} ({', '.join(names)})" for what, names in bad.items() if names)
    limits = [f"{operator} ({', '.join(cautions)})" for operator, cautions in seen.cautions.items()]
    detail += f"; documented limits: {', '.join(limits)}" if limits else ""
    figures = {
        "operators": found.measured(seen.total, "operators", "trace of this model's own work"),
        "native_share": found.measured(100 * seen.native_share, "% of calls", f"trace joined with {seen.source}"),
    }
    found.add(name, "software", needed_for, outcome, detail, seen.total, figures)


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
