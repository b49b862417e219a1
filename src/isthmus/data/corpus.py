"""From problems to token ids: the run's tokenizer, prompts, and the documents of supervised tuning."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.data.tasks import Problem, Task, completion_text, seeded
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.run import RunFolder, new_folder


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first `prompt_length` are given and the rest are to be learnt."""

    tokens: list[int]
    prompt_length: int


def run_tokenizer(run: RunFolder, task: Task) -> Tokenizer:
    """The tokenizer of a run: that of the checkpoint it starts from, or one trained once on the task's own text."""
    folder = run.path / "tokenizer"
    if folder.is_dir():
        return Tokenizer.load(folder)
    source = run.recipe.model.from_
    tokenizer = Tokenizer.load(source) if source else Tokenizer.train(_texts(run, task), run.recipe.model.vocab_size)
    if tokenizer.vocab_size > run.recipe.model.vocab_size:
        raise IsthmusError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model room for {run.recipe.model.vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    with new_folder(folder) as new:
        tokenizer.save(new)
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The prompt of a problem as the model sees it, opened at <think>."""
    return tokenizer.chat([{"role": "user", "content": problem.prompt}])


def sft_documents(run: RunFolder, task: Task, tokenizer: Tokenizer, step: int) -> list[Document]:
    """The worked examples of one step; they depend on the recipe's seed and the step alone."""
    chance = seeded("sft", run.recipe.seed, step)
    problems = chance.choices(task.train, k=run.recipe.sft.batch_size)
    documents = [_document(task, tokenizer, problem, chance.random()) for problem in problems]
    limit = run.recipe.model.max_position_embeddings
    for problem, document in zip(problems, documents, strict=True):
        if len(document.tokens) > limit:
            raise IsthmusError(
                f"the worked example of {problem.id!r} has {len(document.tokens)} tokens, more than "
                f"model.max_position_embeddings = {limit}; raise it, or shorten the data"
            )
    return documents


def _document(task: Task, tokenizer: Tokenizer, problem: Problem, draw: float) -> Document:
    prompt = prompt_ids(tokenizer, problem)
    thought, answer = task.worked_example(problem, seeded(problem.id, draw))
    return Document([*prompt, *tokenizer.encode(completion_text(thought, answer)), tokenizer.eos_id], len(prompt))


def _texts(run: RunFolder, task: Task) -> list[str]:
    chance = seeded("tokenizer", run.recipe.seed)
    sample = task.train if len(task.train) <= 2000 else chance.sample(task.train, 2000)
    return [problem.prompt + completion_text(*task.worked_example(problem, chance)) for problem in sample]
