"""A mixture whose experts come one at a time, asked by several models side by side: each loads each expert once.

Shapes: B rows of T tokens, D hidden, N rows that are sent to experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.formats.parts.pieces import LentExperts
from isthmus.model.moe import MixtureOfExperts, Routing

CANNOT_BE_ASKED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, IsthmusError)
"""What a model that is asked may raise: it is a finding about the model, and no fault of what asks."""


class MixturePass:
    """One model's pass through a mixture on several inputs [B, T, D], expert by expert, inside `context()`.

    `expert` gives an expert as a function of rows [N, D]. What the model raises is kept, and raised by `answers`.
    """

    def __init__(
        self,
        mixture: MixtureOfExperts,
        questions: Sequence[Tensor],
        context: Callable[[], AbstractContextManager[object]],
        expert: Callable[[int], Callable[[Tensor], Tensor]] | None = None,
    ):
        self._mixture, self._context, self._expert = mixture, context, expert or _lent(mixture)
        self._sizes, self._error = [len(x) for x in questions], None
        self._outputs: list[Tensor] = []
        self._attempt(lambda: self._begin(torch.cat(list(questions))))

    def visit(self, index: int) -> None:
        """What an expert makes of the rows that it gets."""
        self._attempt(lambda: self._ask(index))

    def answers(self) -> list[tuple[Tensor, Routing]]:
        """Output [B, T, D] and routing for each of the inputs. Raises what the model raised."""
        found = self._attempt(self._end)
        if self._error is not None:
            raise self._error
        return found

    def _attempt(self, step: Callable[[], Any]) -> Any:
        if self._error is not None:
            return None
        try:
            with self._context():
                return step()
        except CANNOT_BE_ASKED as error:
            self._error = error

    def _begin(self, x: Tensor) -> None:
        self._x, self._sent = x, self._mixture.send(x)
        self._rows = self._sent.rows.split(self._sent.dispatch.counts.tolist())

    def _ask(self, index: int) -> None:
        if len(self._rows[index]):
            self._outputs.append(self._expert(index)(self._rows[index]))

    def _end(self) -> list[tuple[Tensor, Routing]]:
        outputs = torch.cat(self._outputs)
        self._outputs, self._rows, self._sent.rows = [], (), outputs[:0]
        output, routing = self._mixture.combine(self._x, self._sent, outputs)
        return split_rows(output, routing, self._sizes)


def split_rows(output: Tensor, routing: Routing, sizes: list[int]) -> list[tuple[Tensor, Routing]]:
    """What was answered to inputs of so many rows each, one below the other."""
    tokens = [size * output.shape[1] for size in sizes]
    routed = zip(*(part.split(tokens) for part in (routing.experts, routing.weights, routing.scores)), strict=True)
    return [(part, Routing(*one)) for part, one in zip(output.split(sizes), routed, strict=True)]


def _lent(mixture: MixtureOfExperts) -> Callable[[int], Callable[[Tensor], Tensor]]:
    experts = mixture.experts
    assert isinstance(experts, LentExperts), "only experts that come one at a time are visited one by one"
    return lambda index: lambda rows: experts.ask(index, rows)
