"""Accuracy: the answer is an expression that uses each number once and has the target as its value."""

from __future__ import annotations

import ast
import operator
import re

from isthmus.data.countdown import NO_ANSWER
from isthmus.data.tasks import Problem, split_completion
from isthmus.rewards import Reward

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
LONGEST_ANSWER = 64
_WRITTEN = re.compile(r"[0-9+*() -]*")


def score(problem: Problem, completion: str) -> Reward:
    """Format: the thinking is closed once, and an answer follows that is an expression or an admitted failure."""
    _, answer = split_completion(completion)
    if answer is None:
        return Reward(accuracy=0.0, format=0.0)
    worked_out = evaluate(answer)
    if worked_out is None:
        return Reward(accuracy=0.0, format=float(answer == NO_ANSWER))
    value, used = worked_out
    *hand, target = problem.facts
    return Reward(accuracy=float(value == target and sorted(used) == sorted(hand)), format=1.0)


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
