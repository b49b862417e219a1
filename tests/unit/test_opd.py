"""On-policy distillation through the learner: a teacher that is a model here, and one behind a URL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from isthmus.algos import algorithm_config
from isthmus.engines import Completion
from isthmus.errors import IsthmusError
from isthmus.formats.files.golden import TokenScore
from isthmus.model.model import Model
from isthmus.recipe import lineage
from isthmus.recipe.schema import TrainSection
from isthmus.recipe.steps import RlSection, SftSection, TeacherSection
from isthmus.rewards import Scores
from isthmus.stages.steps.rl.beside import Beside, RemoteTeacher
from isthmus.stages.steps.rl.crew import Crew
from isthmus.stages.steps.rl.learner import Learner
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.state import State
from isthmus.trainer.mesh import alone
from isthmus.trainer.parts import initialise
from tests.support.small import tiny_architecture

ARCHITECTURE = tiny_architecture(vocab_size=24, num_nextn_predict_layers=0)
PROMPTS, GROUP, LENGTH = [[3], [5]], 12, 5


def section(**changes: Any) -> RlSection:
    options = {"algorithm": "opd", "teacher": TeacherSection(url="http://teacher"), "max_new_tokens": LENGTH, **changes}
    return RlSection(
        **{"name": "all", "kind": "rl", "steps": 20, "optimizer": {"name": "adamw", "learning_rate": 3e-3}, **options}
    )


def learner_of(folder, beside) -> Learner:
    work: Any = SimpleNamespace(
        section=section(),
        recipe=SimpleNamespace(train=TrainSection(), seed=1),
        architecture=ARCHITECTURE,
        folder=folder,
        event=lambda *_, **__: None,
        events=lambda _: [],
        start=SimpleNamespace(fill=lambda model, seed, *_: initialise(model, seed)),
    )
    return Learner(State.open(work, Crew(alone(torch.device("cpu"))), lambda _: None), beside)


@torch.no_grad()
def written(model, seed: int) -> Rollout:
    """Samples of the model itself, drawn token by token."""
    chance, completions = torch.Generator().manual_seed(seed), []
    for prompt in PROMPTS:
        tokens, logprobs = torch.tensor([prompt] * GROUP), torch.zeros(GROUP, 0)
        for _ in range(LENGTH):
            distribution = model(tokens)[:, -1].log_softmax(-1)
            drawn = torch.multinomial(distribution.exp(), 1, generator=chance)
            tokens, logprobs = torch.cat((tokens, drawn), 1), torch.cat((logprobs, distribution.gather(1, drawn)), 1)
        pairs = zip(tokens[:, len(prompt) :].tolist(), logprobs.tolist(), strict=True)
        completions.append([Completion(*pair, "length", 0, 0) for pair in pairs])
    return Rollout([], PROMPTS, completions, Scores({}, []), 1.0)


class Scorer:
    """A server that scores prompts with a model."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def score(self, sequences):
        found = []
        for tokens in sequences:
            distribution = self.model(torch.tensor([tokens]))[0, :-1].log_softmax(-1)
            own = distribution.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            found.append([TokenScore(value, 0, 0.0) for value in own.tolist()])
        return found


@torch.no_grad()
def reverse_kl(student, teacher, rollout: Rollout) -> float:
    """Over the whole vocabulary, at the places of a rollout."""
    sequences = torch.tensor([rollout.prompts[prompt] + one.tokens for prompt, one in rollout.flat])
    ours, theirs = (model(sequences)[:, :-1].log_softmax(-1) for model in (student, teacher))
    return F.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1).mean().item()


def test_the_student_comes_to_write_as_its_teacher_would(tmp_path):
    teacher = Model(ARCHITECTURE).initialise(7).requires_grad_(False)
    here = learner_of(tmp_path / "here", Beside(teacher=teacher))
    remote = learner_of(tmp_path / "remote", Beside(remote=RemoteTeacher(Scorer(teacher))))
    student, rewards = here.state.model, torch.zeros(2, GROUP)
    before = reverse_kl(student, teacher, written(student, 99))
    for step in range(20):
        rollout = written(student, step)
        if step < 2:
            both = [one.update(rollout, rewards, one.advantages(rollout, rewards)).measures for one in (here, remote)]
            assert both[0] == pytest.approx(both[1], abs=1e-5)
        else:
            here.update(rollout, rewards, here.advantages(rollout, rewards))
        here.state.step += 1
        remote.state.step += 1
    assert reverse_kl(student, teacher, written(student, 99)) < 0.5 * before


def test_a_sample_that_is_left_out_is_not_distilled_either(tmp_path):
    teacher = Model(ARCHITECTURE).initialise(7).requires_grad_(False)
    learner = learner_of(tmp_path, Beside(teacher=teacher))
    rewards = torch.zeros(2, GROUP)
    rewards[0, :5] = torch.nan
    rollout = written(learner.state.model, 0)
    measures = learner.update(rollout, rewards, learner.advantages(rollout, rewards)).measures
    assert measures["trained_tokens"] == (2 * GROUP - 5) * LENGTH


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, "opd needs a teacher: name a step or a url"),
        ({"algorithm": "grpo"}, "grpo learns from rewards alone"),
        ({"temperature": 0.7}, "a server scores at temperature 1, and the step samples at 0.7"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(IsthmusError, match=words):
        algorithm_config(section(**changes))


def test_a_teacher_is_one_thing():
    with pytest.raises(ValueError, match="give one of them"):
        TeacherSection(step="a", url="http://b")


def test_a_teaching_step_comes_before_and_is_used_by_its_student():
    optimizer = {"name": "adamw", "learning_rate": 1e-3}
    taught = {"name": "taught", "kind": "sft", "from": "model", "steps": 1, "optimizer": optimizer}
    steps = [SftSection(**taught), section(name="student", **{"from": "model"}, teacher=TeacherSection(step="taught"))]
    assert lineage.problem(steps, {}, {}, "student") is None
    assert lineage.needs(steps[1], steps) == ["taught"] and lineage.unused(steps, "student") == []
    wrong = [*steps[:1], section(name="student", **{"from": "model"}, teacher=TeacherSection(step="tought"))]
    assert "did you mean 'taught'" in str(lineage.problem(wrong, {}, {}, "student"))
