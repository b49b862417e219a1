"""This run's own work in small: what the probes and pilots of a qualification compute."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from isthmus.data.corpus import Document, prompt_ids, run_tokenizer, sft_documents
from isthmus.engines.local.core.runner import Trial
from isthmus.errors import IsthmusError
from isthmus.model.model import Model
from isthmus.recipe.practice import generating, taught
from isthmus.run import RunFolder
from isthmus.tasks import load_tasks, seeded, tasks_of
from isthmus.trainer.batch import Batch, pack
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.step import accumulate_gradients, target_logprobs, train_step


def first_batch(run: RunFolder) -> Batch:
    """The worked examples of the first step of supervised training, in one row."""
    recipe, tasks = run.recipe, load_tasks(run.recipe)
    text = taught(recipe)
    tokenizer, chance = run_tokenizer(run, list(tasks.values())), seeded(text.kind, recipe.seed, 0)
    return pack(sft_documents(tasks_of(recipe, text, tasks), tokenizer, recipe.model, text.batch_size, chance))


class Workload:
    """This run's own work in small: its model as it starts, its data, and what each stage does at one step."""

    def __init__(self, run: RunFolder, device: torch.device):
        self.run, self.recipe, self.device = run, run.recipe, device
        tasks = load_tasks(run.recipe)
        self.tasks = tasks_of(run.recipe, taught(run.recipe), tasks)
        self.tokenizer = run_tokenizer(run, list(tasks.values()))
        self.text = taught(self.recipe)
        self.start()

    def start(self) -> None:
        """The model and its optimiser as training begins."""
        self.model = Model(self.recipe.model).initialise(self.recipe.seed).to(self.device)
        self.optimizer = Optimizer(self.model, self.text.optimizer, self.text.steps)

    def batch(self, step: int) -> Batch:
        documents = self._documents(step)
        return pack(documents).to(self.device)

    def _documents(self, step: int) -> list[Document]:
        chance = seeded(self.text.kind, self.recipe.seed, step)
        return sft_documents(self.tasks, self.tokenizer, self.recipe.model, self.text.batch_size, chance)

    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of the prompts and of the completions in one step's worked examples."""
        documents = self._documents(0)
        return [d.prompt_length for d in documents], [len(d.tokens) - d.prompt_length for d in documents]

    def prompts(self, count: int) -> list[list[int]]:
        """`count` prompts of the task, over again if it has fewer."""
        problems = next(iter(self.tasks.tasks.values())).train
        return [prompt_ids(self.tokenizer, problems[index % len(problems)]) for index in range(count)]

    def sft_step(self, step: int, batch: Batch) -> float:
        """One step of supervised fine-tuning, as `train` does it. Returns the loss."""
        losses, _ = train_step(self.model, self.optimizer, batch, self.text, step)
        return losses.loss

    def pilot_step(self, step: int) -> float:
        """One step of supervised fine-tuning on its own data. Returns the loss; NaN, and a fresh start for the next
        step, where a loss or a gradient is not finite."""
        batch = self.batch(step)
        try:
            loss = self.sft_step(step, batch)
        except IsthmusError:  # which the optimiser raises for a norm that is not finite
            loss = math.nan
        if not math.isfinite(loss):
            self.start()
        return loss

    def gradients(self, batch: Batch) -> list[Tensor]:
        """The gradients of one batch, without an update."""
        accumulate_gradients(self.model, self.optimizer, batch, self.text)
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def learn(self, batch: Batch) -> None:
        """What reinforcement learning differentiates on a batch of samples, but for the choice of the loss."""
        self.optimizer.zero_grad()
        logprobs, _ = target_logprobs(self.model, batch, generating(self.recipe).temperature)
        logprobs.mean().backward()

    @torch.inference_mode()
    def generate(self, rules: AbstractContextManager[object] | None = None) -> Tensor:
        """Prefill and two more tokens for a few prompts by the engine's forward pass. Returns all logits [N, V].

        `rules` are in force while the chip would work.
        """
        prompts = [prompt for prompt in self.prompts(4) for _ in range(2)]
        trial = Trial(self.model, len(prompts), max(map(len, prompts)) + 2)
        with rules or nullcontext():
            logits = [trial.prefill(prompts)]
            for _ in range(2):
                logits.append(trial.decode(logits[-1].argmax(-1)))
        return torch.cat(logits)
