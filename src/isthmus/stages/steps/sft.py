"""Supervised fine-tuning: worked examples of tasks, and answers that a `sample` step kept."""

from __future__ import annotations

from isthmus.data.corpus import sft_documents
from isthmus.progress import Watch
from isthmus.recipe.steps import SftSection
from isthmus.records import TextRecord
from isthmus.stages.steps.data import data_identity, learnt, tokenizer_of
from isthmus.stages.steps.step import StepRun
from isthmus.stages.steps.text import Text, learn
from isthmus.tasks import seeded
from isthmus.trainer.batch import ROW_LENGTH, Batch, pack
from isthmus.trainer.mesh import Ranks


def execute(step: StepRun[SftSection], watch: Watch, *, profile: bool = False) -> TextRecord:
    """Learn the worked examples that `data` names."""
    return learn(step, watch, lambda ranks: text(step, ranks), profile=profile)


def text(step: StepRun[SftSection], ranks: Ranks) -> Text:
    """What the step learns, as a rank has it."""
    examples, tokenizer, seed = learnt(step), tokenizer_of(step, ranks), step.recipe.seed
    row_length = ROW_LENGTH if step.recipe.train.rows_per_microbatch else None

    def rows(number: int) -> Batch:
        chance = seeded(step.stream, seed, number)
        documents = sft_documents(examples, tokenizer, step.architecture, step.section.batch_size, chance)
        whole = pack(documents, row_length, multiple_of=ranks.world)
        return whole.select(range(ranks.rank, len(whole.tokens), ranks.world))

    return Text(step.name, rows, data_identity(step))
