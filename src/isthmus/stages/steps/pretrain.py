"""Pretraining: next-token prediction on a folder of text or of token shards."""

from __future__ import annotations

from isthmus.data.pretrain import TokenStream
from isthmus.progress import Watch
from isthmus.recipe.steps import PretrainSection
from isthmus.records import TextRecord
from isthmus.stages.steps.data import tokenizer_of
from isthmus.stages.steps.step import StepRun
from isthmus.stages.steps.text import Text, learn
from isthmus.trainer.batch import Batch, batch_of_rows
from isthmus.trainer.mesh import Ranks


def execute(step: StepRun[PretrainSection], watch: Watch, *, profile: bool = False) -> TextRecord:
    """Learn the folder's text, row by row."""
    return learn(step, watch, lambda ranks: text(step, ranks), profile=profile)


def text(step: StepRun[PretrainSection], ranks: Ranks) -> Text:
    """What the step learns, as a rank has it."""
    section, tokenizer, cache = step.section, tokenizer_of(step, ranks), step.folder / "tokens"
    stream = TokenStream(
        section.folder, tokenizer, section.row_length, step.recipe.seed, cache, first_of_node=ranks.first_of_node
    )

    def rows(number: int) -> Batch:
        row = number * section.rows_per_step
        stream.prepare(row, section.rows_per_step)
        count = len(range(ranks.rank, section.rows_per_step, ranks.world))
        if not count:
            return Batch.empty(section.row_length)
        return batch_of_rows(stream.rows(row + ranks.rank, count, ranks.world))

    return Text(step.name, rows, stream.fingerprint)
