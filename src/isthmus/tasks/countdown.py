"""Countdown: reach a target from three numbers with + - *, each number used once.

The teacher tries one expression after another, holds each value against the target and marks a hit. It is impatient:
after a miss it may give up, and says so. A model taught by it learns the skill and the habit of stopping early;
reinforcement learning then teaches it to think on. On a few problems the teacher is patient, so that the model has seen
a long thought before it writes one. Differences are taken from the larger number: every step is a natural number.
"""

from __future__ import annotations

import ast
import itertools
import operator
import random
import re
from dataclasses import dataclass
from functools import cached_property

from isthmus.recipe.section import Share, Whole, key
from isthmus.tasks.parts.completions import split_completion
from isthmus.tasks.parts.contract import TaskOptions
from isthmus.tasks.parts.problems import Problem, split

MISS, HIT, GIVE_UP = "✗", "✓", "give up"
AGAINST = "vs"
MIXED = {AGAINST: "对照", GIVE_UP: "放弃"}
"""The teacher's words in another script, in which it writes some of its lines if it is told to."""
NO_ANSWER = "none"
HAND = 3
"""Numbers of a problem."""
LONGEST_ANSWER = 64
"""Characters. What is longer is no expression."""

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_WRITTEN = re.compile(r"[0-9+*() -]*")


class Options(TaskOptions):
    """Problems that are generated, and their teacher."""

    largest: Whole = key(12, "the largest of the numbers", ge=2, le=99)
    largest_target: Whole = key(40, "the largest target", ge=1, le=999)
    heldout_share: Share = key(0.2, "share of the problems that is never trained on")
    teacher_hit: Share = key(0.2, "chance that the teacher's next try is a solution on purpose")
    teacher_give_up: Share = key(0.35, "chance that the teacher gives up after a miss")
    teacher_patient: Share = key(0.05, "share of problems tried at random until one fits")
    teacher_mixes: Share = key(0.0, "share of the teacher's lines whose words are in another script than the prompt's")


@dataclass(frozen=True)
class Try:
    """One expression: `steps` as the teacher writes them, the whole `expression`, and its `value`."""

    steps: str
    expression: str
    value: int


@dataclass
class Countdown:
    """All problems with at least one solution, and the teacher."""

    options: Options

    @cached_property
    def _split(self) -> tuple[list[Problem], list[Problem]]:
        hands = itertools.combinations_with_replacement(range(1, self.options.largest + 1), HAND)
        problems = [problem for hand in hands for problem in self._problems(hand)]
        return split(problems, self.options.heldout_share)

    @property
    def about(self) -> str:
        return f"countdown: three numbers up to {self.options.largest}, targets up to {self.options.largest_target}"

    @property
    def train(self) -> list[Problem]:
        return self._split[0]

    @property
    def heldout(self) -> list[Problem]:
        return self._split[1]

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str]:
        """The impatient teacher at work on a problem: (thought, answer)."""
        *hand, target = problem.facts
        untried = self.tries(tuple(hand))
        chance.shuffle(untried)
        patient = chance.random() < self.options.teacher_patient
        hit, give_up = (0.0, 0.0) if patient else (self.options.teacher_hit, self.options.teacher_give_up)
        lines = []
        while True:
            one = _next_try(untried, target, chance.random() < hit)
            against = self._written(AGAINST, chance)
            if one.value == target:
                return "".join([*lines, f"{one.steps} {against} {target} {HIT}\n"]), one.expression
            lines.append(f"{one.steps} {against} {target} {MISS}\n")
            if chance.random() < give_up:
                return "".join([*lines, f"{self._written(GIVE_UP, chance)}\n"]), NO_ANSWER

    def accuracy(self, problem: Problem, completion: str) -> float:
        """1 if the answer is an expression that uses each number once and has the target as its value."""
        _, answer = split_completion(completion)
        worked_out = None if answer is None else evaluate(answer)
        if worked_out is None:
            return 0.0
        value, used = worked_out
        *hand, target = problem.facts
        return float(value == target and sorted(used) == sorted(hand))

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """The thinking is closed once, and an answer follows that is an expression or an admitted failure."""
        _, answer = split_completion(completion)
        return answer is not None and (answer == NO_ANSWER or evaluate(answer) is not None)

    def tries(self, hand: tuple[int, ...]) -> list[Try]:
        """The expressions over three numbers whose value can be a target. Of those that differ only by the order in a
        sum or a product, one is kept: its larger numbers come first."""
        found: dict[str, Try] = {}
        for first, second, third in itertools.permutations(hand):
            for inner, part in _combine(first, second):
                for outer, value in _combine(part, third):
                    if 1 <= value <= self.options.largest_target and _is_canonical(inner, outer, first, second, third):
                        expression = _join(inner, outer, part, third)
                        found[expression] = Try(f"{inner} = {part}, {outer} = {value}", expression, value)
        return list(found.values())

    def _written(self, word: str, chance: random.Random) -> str:
        """A word as the teacher writes it on a line. A teacher that does not mix draws nothing."""
        mixes = self.options.teacher_mixes
        return MIXED[word] if mixes and chance.random() < mixes else word

    def _problems(self, hand: tuple[int, ...]) -> list[Problem]:
        solutions: dict[int, str] = {}
        for one in self.tries(hand):
            solutions.setdefault(one.value, one.expression)
        return [_problem(hand, target, solutions[target]) for target in sorted(solutions)]


def open(options: Options) -> Countdown:
    return Countdown(options)


def evaluate(expression: str) -> tuple[int, list[int]] | None:
    """(value, numbers used) of a sum of products over natural numbers; None if it is anything else."""
    if len(expression) > LONGEST_ANSWER or not _WRITTEN.fullmatch(expression):
        return None
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    used: list[int] = []
    value = _value(tree.body, used)
    return None if value is None else (value, used)


def _value(node: ast.expr, used: list[int]) -> int | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, used), _value(node.right, used)
        return None if left is None or right is None else _OPERATORS[type(node.op)](left, right)
    return None


def _next_try(untried: list[Try], target: int, on_purpose: bool) -> Try:
    """Take one out of the untried expressions: any of them, or a solution on purpose."""
    one = next(one for one in reversed(untried) if one.value == target or not on_purpose)
    untried.remove(one)
    return one


def _problem(hand: tuple[int, ...], target: int, solution: str) -> Problem:
    numbers = " ".join(map(str, hand))
    return Problem(
        id=f"countdown {numbers} -> {target}",
        prompt=f"Make {target} from {numbers}.",
        answer=solution,
        facts=(*hand, target),
    )


def _combine(a: int, b: int) -> list[tuple[str, int]]:
    """Ways to join two numbers, written as they are worked out. The difference is larger minus smaller."""
    larger, smaller = max(a, b), min(a, b)
    return [(f"{a} + {b}", a + b), (f"{a} * {b}", a * b), (f"{larger} - {smaller}", larger - smaller)]


def _is_canonical(inner: str, outer: str, first: int, second: int, third: int) -> bool:
    same_operator = any(sign in inner and sign in outer for sign in "+*")
    return first >= second and (second >= third or not same_operator)


def _join(inner: str, outer: str, part: int, third: int) -> str:
    """The whole expression of an inner step and of the outer step that joins its result with the third number."""
    if "-" in outer and part < third:
        return f"{third} - ({inner})"
    return f"({inner})" + outer.removeprefix(str(part))
