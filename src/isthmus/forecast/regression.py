"""Robust linear regression with a normal prior on each weight, in pure Python: it answers in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

NOISE = 0.08
"""Spread of a published result about its expectation, in the logarithm, without outliers."""
TAIL = 3.0
"""Degrees of freedom of Student's t: how lightly outliers weigh."""
_ROUNDS = 6

Vector = Sequence[float]


def fit(rows: Sequence[Vector], values: Vector, spreads: Vector) -> list[float]:
    """Weights w with rows @ w close to `values`; weight k has the prior N(0, spreads[k]^2).

    Student-t noise by iterated reweighting. Raises ValueError for rows that leave a weight undetermined, which a
    positive spread rules out.
    """
    columns = list(zip(*rows, strict=True)) if rows else [() for _ in spreads]
    weights = [0.0] * len(spreads)
    trust = [1.0] * len(values)
    for _ in range(_ROUNDS):
        weights = _solve_round(columns, values, spreads, trust)
        left = residuals(rows, values, weights)
        trust = [1.0 / (1.0 + (one / NOISE) ** 2 / TAIL) for one in left]
    return weights


def residuals(rows: Sequence[Vector], values: Vector, weights: Vector) -> list[float]:
    """What the weights leave unexplained."""
    return [value - dot(row, weights) for row, value in zip(rows, values, strict=True)]


def dot(one: Vector, other: Vector) -> float:
    return math.fsum(map(mul, one, other))


def _solve_round(columns: Sequence[Vector], values: Vector, spreads: Vector, trust: Vector) -> list[float]:
    scale = 1.0 / NOISE**2
    size = len(spreads)
    matrix = [[0.0] * size for _ in range(size)]
    right = [0.0] * size
    for i, column in enumerate(columns):
        trusted = list(map(mul, column, trust))
        right[i] = scale * sum(map(mul, trusted, values))
        for j in range(i + 1):
            matrix[i][j] = matrix[j][i] = scale * sum(map(mul, trusted, columns[j]))
        matrix[i][i] += 1.0 / spreads[i] ** 2
    return solve(matrix, right)


def solve(matrix: Sequence[Vector], right: Vector) -> list[float]:
    """x with matrix @ x = right, for a symmetric positive definite matrix, by Cholesky's method."""
    size = len(right)
    lower: list[list[float]] = []
    for i in range(size):
        row: list[float] = []
        for j in range(i + 1):
            rest = matrix[i][j] - sum(map(mul, row, lower[j])) if j < i else matrix[i][i] - sum(map(mul, row, row))
            if j == i and rest <= 0.0:
                raise ValueError("the matrix is not positive definite")
            row.append(math.sqrt(rest) if j == i else rest / lower[j][j])
        lower.append(row)
    forward: list[float] = []
    for i in range(size):
        forward.append((right[i] - sum(map(mul, lower[i], forward))) / lower[i][i])
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = forward[i] - sum(lower[k][i] * found[k] for k in range(i + 1, size))
        found[i] = rest / lower[i][i]
    return found
