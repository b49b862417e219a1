"""From problems to token ids: the run's tokenizer, prompts, and the documents of supervised tuning."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from isthmus.data.chat_template import END_THINK, THINK
from isthmus.data.pretrain import corpus_tokenizer, sample_texts
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.practice import pretrained
from isthmus.run import RunFolder, new_folder
from isthmus.tasks import Mixture, Problem, Task, completion_text, seeded

TOKENIZER_SAMPLE_BYTES, TEXTS = 64 * 2**20, 2000
"""What a new tokenizer is trained on, at most: bytes of the corpus, and problems of each task."""


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first `prompt_length` are given and the rest are to be learnt."""

    tokens: list[int]
    prompt_length: int


def run_tokenizer(run: RunFolder, tasks: Sequence[Task], model: str | None = None) -> Tokenizer:
    """The tokenizer of a run's model: that of the checkpoint it starts from or of the corpus, or one trained on its
    text. A further `model` has its own if it starts from a checkpoint, and else the run's."""
    recipe = run.recipe
    architecture = recipe.model if model is None else recipe.models[model]
    folder = run.path / ("tokenizer" if model is None or architecture.from_ is None else f"tokenizer-{model}")
    if folder.is_dir():
        run.enter(folder)
        return _fitting(Tokenizer.load(folder), architecture, model)
    given = recipe.model if folder.name == "tokenizer" else architecture
    tokenizer = _fitting(_new_tokenizer(run, given, tasks), architecture, model)
    with new_folder(folder) as new:
        tokenizer.save(new)
        ends = json.dumps({"eos_token_id": list(tokenizer.ends)})
        (new / "generation_config.json").write_text(ends, encoding="utf-8")
    run.enter(folder)
    return tokenizer


def _fitting(tokenizer: Tokenizer, architecture: ModelSection, model: str | None) -> Tokenizer:
    if tokenizer.vocab_size > architecture.vocab_size:
        where = "model" if model is None else f"models.{model}"
        raise IsthmusError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model room for {architecture.vocab_size}; "
            f"set {where}.vocab_size to at least {tokenizer.vocab_size}"
        )
    return tokenizer


def _new_tokenizer(run: RunFolder, architecture: ModelSection, tasks: Sequence[Task]) -> Tokenizer:
    source, pretrain = architecture.from_, pretrained(run.recipe)
    if source is not None:
        return Tokenizer.load(source)
    if pretrain is not None and (given := corpus_tokenizer(pretrain.folder)) is not None:
        return given
    corpus = sample_texts(pretrain.folder, TOKENIZER_SAMPLE_BYTES) if pretrain is not None else ()
    return Tokenizer.train(itertools.chain(corpus, _texts(run, tasks)), architecture.vocab_size)


def prompt_ids(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The prompt of a problem as the model sees it, by its own template."""
    return tokenizer.chat(problem.conversation)


def completion_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of a completion as rewards read it: all of it is the answer where nothing opens the thinking."""
    text = tokenizer.decode(tokens)
    thinks = tokenizer.opens_thinking or THINK in text or END_THINK in text
    return text if thinks else completion_text("", text)


def sft_documents(
    examples: Mixture, tokenizer: Tokenizer, architecture: ModelSection, count: int, chance: random.Random
) -> list[Document]:
    """`count` worked examples; they depend on `chance` alone. Raises IsthmusError for one that is too long."""
    problems = examples.draw(chance, count)
    documents = [_document(examples.of(problem), tokenizer, problem, chance.random()) for problem in problems]
    limit = architecture.max_position_embeddings
    for problem, document in zip(problems, documents, strict=True):
        if len(document.tokens) > limit:
            raise IsthmusError(
                f"the worked example of {problem.id!r} has {len(document.tokens)} tokens, more than "
                f"model.max_position_embeddings = {limit}; raise it, or shorten the data"
            )
    return documents


def _document(task: Task, tokenizer: Tokenizer, problem: Problem, draw: float) -> Document:
    prompt = prompt_ids(tokenizer, problem)
    example = task.worked_example(problem, seeded(problem.id, draw))
    if example is None:
        raise IsthmusError(f"{problem.id!r} has no worked example, and supervised fine-tuning learns from those")
    thought, answer = example
    text = completion_text(thought, answer)
    if not tokenizer.opens_thinking:
        text = f"{THINK}\n{text}" if thought else answer
    return Document([*prompt, *tokenizer.encode(text), tokenizer.eos_id], len(prompt))


def _texts(run: RunFolder, tasks: Sequence[Task]) -> Iterator[str]:
    chance = seeded("tokenizer", run.recipe.seed)
    for task in tasks:
        sample = task.train if len(task.train) <= TEXTS else chance.sample(task.train, TEXTS)
        for problem in sample:
            example = task.worked_example(problem, chance)
            yield problem.prompt + (completion_text(*example) if example else "")
