"""The hand-off: the trained weights in the format of the pool that serves them, a parity gate, and a seal.

Every source tensor is followed into each bundle, golden inputs are captured, and the bundle is verified as on the
machine of its target: files, configuration, modules, tokens. The reference is the fp32 model on the CPU. It writes
golden sequences, and every bundle is compared with it token by token on these; the target bundle also answers the
held-out problems in an engine of its own, with the same random numbers as the reference, so that the answers pair. A
gate that refuses writes its record and seals nothing.

Here is the hand-off of a run; that of a checkpoint that was trained elsewhere is in `published`.
"""

from __future__ import annotations

import time
from functools import partial

from rich.console import RenderableType

from isthmus.errors import GateRefused
from isthmus.launch.pool_ranks import run_on
from isthmus.parity import gate
from isthmus.parity.seal import Lineage, write_seal
from isthmus.progress import Watch
from isthmus.records import HandoffRecord, read_weights
from isthmus.run import RunFolder
from isthmus.stages.handoff.crossing import (
    NAME,
    PLAIN,
    Crossing,
    Engines,
    Examination,
    Writer,
    Written,
    reference_bundle,
)


def refuse_drill(run: RunFolder) -> None:
    """Raise GateRefused for a drill."""
    if run.recipe.drill is not None:
        raise GateRefused(f"{run.path} is a drill: its weights come from planted faults, and are not sealed for use.")


def execute(run: RunFolder, watch: Watch) -> HandoffRecord:
    """Write the bundles, check them against the fp32 reference, and seal them. Raises GateRefused if one refuses.

    If the pool that serves is on nodes of a cluster, all of this is done on one of them.
    """
    started = time.time()
    refuse_drill(run)
    crossing = Crossing.of(run)
    if crossing.target.nodes is not None:
        run_on(crossing.target, NAME, run.path, {}, 1, run.path / "handoff-ranks")
        return run.require_record("parity", HandoffRecord, NAME)
    run.event(NAME, "start", pool=crossing.target.name, source_pool=crossing.source.name)
    (run.path / "parity.json").unlink(missing_ok=True)
    engines, examination = Engines(crossing), Examination(crossing, watch)
    with reference_bundle(crossing) as reference:
        written = Writer(crossing, engines, watch).write_all(reference)
        target = written[crossing.section.format].bundle
        if examination.can_run(target):
            watch.say(f"  {len(crossing.problems)} held-out problems, answered by the reference and by the target")
            expected, found = engines.answer_both(reference, target)
            golden = crossing.golden_sequences(expected)
            for one in written.values():
                examination.verify(one, golden)
            for one in written.values():
                examination.compare_tokens(one.bundle, golden)
            start = crossing.architecture.from_
            if start is not None and PLAIN in written:
                examination.compare_updates(written[PLAIN], start)
            examination.compare_engine(target, found)
            examination.compare_accuracy(target, expected, found)
        examination.write_events()
    record = conclude(run, crossing, written, examination, started)
    if record.verdict == "refuse":
        watch.console.print(render(record))
        raise GateRefused(refusal(run, record))
    watch.say(f"  sealed {record.bundles[record.format]} as {record.seal_id}")
    return record


def render(record: HandoffRecord) -> RenderableType:
    """What the gate found, in a few lines."""
    title = f"parity of {record.format} for pool {record.target_pool}: {record.verdict}"
    return gate.check_summary(title, record.checks, f"RUN/{record.bundles.get(record.format, '')}")


def refusal(run: RunFolder, record: HandoffRecord) -> str:
    """Why nothing is sealed, and what may help."""
    opening = "the hand-off is refused; no bundle is sealed."
    return (
        f"{gate.refusal(opening, record.checks, record.culprit, record.operator)}\n"
        f"All checks are in {run.path / 'parity.json'}. Another format or more training may pass, and more problems\n"
        "or golden prompts where nothing was shown: change [handoff] or the steps and use a new run folder."
    )


def conclude(
    run: RunFolder, crossing: Crossing, written: dict[str, Written], examination: Examination, started: float
) -> HandoffRecord:
    """Write the record; if no check refuses, the bundles are sealed first."""
    verdicts, chosen = examination.verdicts, crossing.section.format
    refused = next((verdict for verdict in verdicts.values() if verdict.verdict == "refuse"), None)
    record = HandoffRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        source_pool=crossing.source.name,
        target_pool=crossing.target.name,
        format=chosen,
        verdict="pass" if gate.shows_enough(examination.checks) else "refuse",
        checks=examination.checks,
        bundles={name: str(one.bundle.folder.relative_to(run.path)) for name, one in written.items()},
        seal_id=None,
        figures=examination.figures,
        ledger=verdicts[chosen].ledger if chosen in verdicts else [],
        culprit=refused.culprit if refused else None,
        operator=refused.operator if refused else None,
    )
    if record.verdict == "pass":
        lineage = Lineage(
            checkpoint_sha256=read_weights(run, run.recipe.handed_off.name).checkpoint_sha256,
            recipe_sha256=record.recipe_sha256,
            run_sha256=run.digest,
            source_pool=record.source_pool,
            target_pool=record.target_pool,
        )
        seal = partial(write_seal, verdict="pass", checks=record.checks, lineage=lineage)
        key = crossing.section.sign_key
        seals = {name: seal(one.bundle.folder, sign_key=key).id for name, one in written.items()}
        record = record.model_copy(update={"seal_id": seals[chosen]})
    else:
        for one in written.values():
            examination.refuse(one.bundle)
    run.write_record("parity", record)
    run.event(NAME, "verdict", verdict=record.verdict, seal_id=record.seal_id)
    run.event(NAME, "end", seconds=round(record.seconds, 3))
    return record
