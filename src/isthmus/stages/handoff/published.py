"""The hand-off of what was trained elsewhere: the whole gate for the bundle of a published checkpoint.

No run folder and no training is needed. Every tensor of the checkpoint is followed into the bundle, which gets golden
answers and golden inputs and is verified as its target would; with a task both models answer its problems. The golden
prompts are the user's, or the model's own answers to the task, or else random tokens, which say little.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus import chips
from isthmus.chips import check_tables, get_chip
from isthmus.data.prompts import PromptFile
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Sampling
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats import recognise_format
from isthmus.formats.files.basis import read_conversion
from isthmus.formats.files.bundle import CONFIG, Bundle, architecture_of, open_bundle, read_config
from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.parity import gate
from isthmus.parity.capture import SYNTHETIC, synthetic_prompts
from isthmus.parity.manifest import add_file
from isthmus.parity.seal import Lineage, write_seal
from isthmus.parity.target import DTYPES
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.verify import Target
from isthmus.pools import Pool, default_threads
from isthmus.progress import Watch
from isthmus.recipe.schema import HandoffSection, ServeSection
from isthmus.records import ParityVerdict
from isthmus.stages.handoff.crossing import (
    SAMPLES_PER_PROBLEM,
    Answers,
    Crossing,
    Engines,
    Examination,
    Written,
    reference_bundle,
)
from isthmus.tasks import Mixture, NamedTask, interleaved, open_task, task_options
from isthmus.tasks.jsonl import load_heldout

CPU = "cpu"
EXAMPLES, MOST_EXAMPLES = "examples.json", 6
SHARE_OF_BUDGET = 0.6
"""Of what a format may cost, a mixture is chosen for: the interval of its cost has to fit, too."""
COMMAND_LINE = "the command line"
ANSWER_TOKENS = 256
CHECKPOINT = "the checkpoint"


@dataclass(frozen=True)
class Options:
    """What `isthmus handoff CHECKPOINT` can be told, beside what conversion is told.

    `on` is a torch device, or a chip that is not here and is rehearsed. `prompts` is a file of golden prompts;
    `task` a name of a task or a file of problems. Limits are those of [handoff].
    """

    prompts: Path | None = None
    task: str | None = None
    on: str = CPU
    dtype: str = "fp32"
    problems: int = 100
    max_new_tokens: int = ANSWER_TOKENS
    temperature: float = ServeSection().temperature
    max_mean_kl: float = HandoffSection().max_mean_kl
    max_chip_kl: float = HandoffSection().max_chip_kl
    max_accuracy_drop: float = HandoffSection().max_accuracy_drop
    max_mb: int = HandoffSection().capture_mb
    sign_key: Path | None = None

    def section(self, format_name: str) -> HandoffSection:
        """The same as [handoff] says it, of a bundle in this format."""
        return HandoffSection(
            format=format_name,
            heldout_problems=self.problems,
            max_mean_kl=self.max_mean_kl,
            max_chip_kl=self.max_chip_kl,
            max_accuracy_drop=self.max_accuracy_drop,
            capture_mb=self.max_mb,
            sign_key=self.sign_key,
        )


@dataclass(frozen=True)
class Asked:
    """What the options name, read and checked before the first second is spent on a conversion.

    `sequences` are the golden ones of a file. `on` is the target, `chip` the kind of chip that it has, or stands for.
    """

    options: Options
    sequences: list[list[int]] | None
    task: Mixture | None
    on: Target
    chip: str


def prepare(source: Path, options: Options) -> Asked:
    """Read what the options name. Raises IsthmusError for what does not fit `source`, or each other, and for a source
    whose tokenizer could not be served."""
    if not (source / CONFIG).is_file():
        raise IsthmusError(f"{source} is no checkpoint: it has no {CONFIG}, and no recipe.json of a run either")
    if options.dtype not in DTYPES:
        raise IsthmusError(f"unknown dtype {options.dtype!r}; known: {', '.join(DTYPES)}")
    architecture = architecture_of(source, read_config(source))
    Tokenizer.load(source)
    on, chip = _target(options)
    if options.task is not None and on.device != CPU:
        raise IsthmusError(
            f"--task lets engines answer, and the engine here computes on the CPU, not on {on.device}: leave --task "
            f"out, or name a chip to rehearse, or --target {CPU}"
        )
    sequences = None
    if options.prompts is not None:
        sequences = PromptFile(options.prompts, source, architecture.vocab_size).sequences()
    return Asked(options, sequences, _task(options.task), on, chip)


def execute(source: Path, folder: Path, asked: Asked, watch: Watch) -> ParityVerdict:
    """Examine the bundle `folder` that was made of the checkpoint `source`, and seal it.

    Its verdict is left in it either way. Raises GateRefused with the reasons if the gate refuses; nothing is sealed
    then.
    """
    with open_bundle(folder) as bundle, StoredTensors(source) as stored:
        crossing = _crossing(Checkpoint(stored, bundle.architecture), bundle, asked, watch)
        examination = Examination(crossing, watch)
        if examination.can_run(bundle):
            _examine(crossing, examination, bundle, asked, watch)
        verdict = examination.write_verdict(bundle)
    title = f"parity on {verdict.target}: {verdict.verdict}"
    watch.console.print(gate.check_summary(title, verdict.checks, str(folder)))
    if verdict.verdict == "refuse":
        opening = f"{folder} is refused, and not sealed."
        reasons = gate.refusal(opening, verdict.checks, verdict.culprit, verdict.operator)
        raise GateRefused(f"{reasons}\n{_what_may_help(verdict, source, folder, asked)}")
    lineage = Lineage(target_pool=verdict.target)
    seal = write_seal(folder, verdict="pass", checks=verdict.checks, lineage=lineage, sign_key=asked.options.sign_key)
    watch.say(f"  sealed {folder} as {seal.id}")
    watch.say(f"  look   isthmus inspect {folder}")
    watch.say(f"  chat   isthmus serve {folder}")
    return verdict


def _examine(crossing: Crossing, examination: Examination, bundle: Bundle, asked: Asked, watch: Watch) -> None:
    expected: Answers = []
    found: Answers = []
    if asked.task is not None:
        watch.say(f"  {len(crossing.problems)} problems, answered by the checkpoint and by {bundle.format}")
        try:
            with reference_bundle(crossing) as reference:
                expected, found = Engines(crossing).answer_both(reference, bundle)
        finally:
            shutil.rmtree(crossing.work, ignore_errors=True)
        prompts = [problem.prompt for problem in crossing.problems[:MOST_EXAMPLES]]
        add_file(bundle.folder, EXAMPLES, json.dumps(prompts, ensure_ascii=False).encode() + b"\n")
    golden = _golden(crossing, asked, expected)
    examination.verify(Written(bundle, read_conversion(bundle.folder)), golden, [one.prompt for one in golden])
    if asked.task is not None:
        examination.compare_engine(bundle, found)
        examination.compare_accuracy(bundle, expected, found)


def _golden(crossing: Crossing, asked: Asked, answers: Answers) -> list[GoldenSequence]:
    """The user's sequences, else the model's own answers, else random tokens."""
    if asked.sequences is None and answers:
        return crossing.golden_sequences(answers)
    sequences = asked.sequences
    if sequences is None:
        sequences = synthetic_prompts(crossing.architecture.vocab_size)
    return [GoldenSequence.halved(one) for one in sequences if len(one) > 1]


def _crossing(checkpoint: Checkpoint, bundle: Bundle, asked: Asked, watch: Watch) -> Crossing:
    options, task, folder = asked.options, asked.task, bundle.folder
    if asked.sequences is not None:
        assert options.prompts is not None
        origin = options.prompts.name
    else:
        origin = f"the checkpoint's own answers to {options.task}" if task is not None else SYNTHETIC
    if origin == SYNTHETIC:
        watch.say(
            "  [yellow]neither --prompts nor --task: golden prompts are random tokens, on which a trained model is at "
            "a loss. What the format costs on text is not what is measured[/]"
        )
    else:
        watch.say(f"  [yellow]golden prompts of {origin} are in the bundle, and who has it can read them[/]")
    threads = default_threads()
    rehearsed = asked.on.rehearse is not None

    def pool(name: str, chip: str, rehearsed: bool) -> Pool:
        return Pool(name, chip, 1, 1, rehearsed, threads, max(1, threads // 2))

    return Crossing(
        folder=folder.parent,
        work=folder.with_name(f".{folder.name}.handoff"),
        architecture=checkpoint.architecture,
        state=checkpoint.state(),
        tokenizer=Tokenizer.load(folder),
        section=options.section(bundle.format),
        limits_from=COMMAND_LINE,
        asked=origin,
        tasks=task,
        problems=interleaved(task.heldout, options.problems) if task is not None else [],
        sampling=Sampling(options.max_new_tokens, options.temperature, n=SAMPLES_PER_PROBLEM),
        seed=0,
        source=pool(CHECKPOINT, CPU, False),
        target=pool("the target", asked.chip, rehearsed),
        on=asked.on,
        tell=lambda event, **fields: _say_fallback(watch, event, fields),
    )


def _say_fallback(watch: Watch, event: str, fields: dict[str, Any]) -> None:
    """There is no run folder to note it: what a run would note as a fallback is said."""
    if event == "fallback":
        watch.say(f"  [yellow]{fields['what']}: {fields['why']}[/]")


def _target(options: Options) -> tuple[Target, str]:
    """The target, and the kind of chip that it has; a device's own name where its chip is not asked for."""
    if options.on in chips.load_chips() and options.on != CPU:
        check_tables(options.on)
        return Target(CPU, options.dtype, options.on), get_chip(options.on).slug
    return Target(options.on, options.dtype), options.on


def _task(given: str | None) -> Mixture | None:
    """A task by its kind, or of a file of held-out problems."""
    if given is None:
        return None
    if Path(given).is_file():
        return Mixture({given: NamedTask(load_heldout(Path(given)), given, None)}, {given: 0.0}, heldout_alone=True)
    if given == "countdown":
        return Mixture({given: open_task(given, task_options(given, {}), given)}, {given: 1.0})
    raise IsthmusError(
        f'--task {given}: neither a file with a line {{"prompt": ..., "answer": ...}} per problem, nor \'countdown\''
    )


def _cheaper(source: Path, folder: Path, options: Options) -> list[str]:
    """Commands whose bundles lose less than that of `folder`, the one that computes in int8 alone first."""
    prompts = "" if options.prompts is None else f" --prompts {options.prompts}"
    command = f"  isthmus handoff {source}{prompts}"
    used = recognise_format(read_config(folder)).name
    found = []
    if not read_conversion(folder).balance:
        found.append(f"{command} --format {used} --balance --calibrate FILE")
    mixed = f"--format modelslim_mixed --budget {SHARE_OF_BUDGET * options.max_mean_kl:g} --calibrate FILE"
    return [*found, f"{command} {mixed}", f"{command} --format bf16"]


def _what_may_help(verdict: ParityVerdict, source: Path, folder: Path, asked: Asked) -> str:
    """What to try next, by what refused."""
    names = {check.name for check in verdict.checks if gate.refuses(check)}
    advice = []
    if gate.COST in names:
        told = "\n".join(_cheaper(source, folder, asked.options))
        advice.append(
            f"The format costs more than its budget. These cost less, on text of the model's own in FILE:\n{told}\n"
            "Or --max-mean-kl says that more may be lost"
        )
    if gate.COST in names and asked.sequences is None and asked.task is None:
        advice.append("It was measured on random tokens: give --prompts FILE.jsonl or --task T")
    if any(check.outcome == "unknown" for check in verdict.checks):
        advice.append("Where nothing was shown, more prompts or --problems tell more")
    advice.append("`isthmus inspect` shows all of it")
    return ". ".join(advice) + "."
