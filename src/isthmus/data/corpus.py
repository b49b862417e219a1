"""From problems to token ids: the run's tokenizer, prompts, and the documents of supervised tuning."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

from isthmus.data.chat_template import END_THINK, THINK
from isthmus.data.pretrain import corpus_tokenizer, sample_texts
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.run import RunFolder, new_folder
from isthmus.tasks import Problem, Task, completion_text, seeded

TOKENIZER_SAMPLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first `prompt_length` are given and the rest are to be learnt."""

    tokens: list[int]
    prompt_length: int


def run_tokenizer(run: RunFolder, task: Task) -> Tokenizer:
    """The tokenizer of a run: that of the checkpoint it starts from or of the corpus, or one trained on its text."""
    folder = run.path / "tokenizer"
    if folder.is_dir():
        return Tokenizer.load(folder)
    tokenizer = _new_tokenizer(run, task)
    if tokenizer.vocab_size > run.recipe.model.vocab_size:
        raise IsthmusError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model room for {run.recipe.model.vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    with new_folder(folder) as new:
        tokenizer.save(new)
        ends = json.dumps({"eos_token_id": list(tokenizer.ends)})
        (new / "generation_config.json").write_text(ends, encoding="utf-8")
    return tokenizer


def _new_tokenizer(run: RunFolder, task: Task) -> Tokenizer:
    source, pretrain = run.recipe.model.from_, run.recipe.pretrain
    if source is not None:
        return Tokenizer.load(source)
    if pretrain is not None and (given := corpus_tokenizer(pretrain.folder)) is not None:
        return given
    corpus = sample_texts(pretrain.folder, TOKENIZER_SAMPLE_BYTES) if pretrain is not None else ()
    return Tokenizer.train(itertools.chain(corpus, _texts(run, task)), run.recipe.model.vocab_size)


def prompt_ids(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The prompt of a problem as the model sees it, by its own template."""
    return tokenizer.chat(problem.conversation)


def completion_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of a completion as rewards read it: all of it is the answer where nothing opens the thinking."""
    text = tokenizer.decode(tokens)
    thinks = tokenizer.opens_thinking or THINK in text or END_THINK in text
    return text if thinks else completion_text("", text)


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
    example = task.worked_example(problem, seeded(problem.id, draw))
    if example is None:
        raise IsthmusError(f"{problem.id!r} has no worked example, and supervised fine-tuning learns from those")
    thought, answer = example
    text = completion_text(thought, answer)
    if not tokenizer.opens_thinking:
        text = f"{THINK}\n{text}" if thought else answer
    return Document([*prompt, *tokenizer.encode(text), tokenizer.eos_id], len(prompt))


def _texts(run: RunFolder, task: Task) -> list[str]:
    chance = seeded("tokenizer", run.recipe.seed)
    sample = task.train if len(task.train) <= 2000 else chance.sample(task.train, 2000)
    examples = ((problem.prompt, task.worked_example(problem, chance)) for problem in sample)
    return [prompt + completion_text(*example) if example else prompt for prompt, example in examples]
