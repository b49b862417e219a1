"""Whether one model answers as well as another: paired accuracy with its interval, and a non-inferiority verdict.

Both models answer the same problems, each the same number of times, so a difference is counted in pairs. The interval
is Newcombe's method 10 for paired proportions (Statistics in Medicine 17, 1998, 2635-2650): it combines two Wilson
intervals and does not shrink to nothing when no pair differs. Several answers to one problem are not independent; the
counts are divided by the design effect first (Rao and Scott, Biometrics 48, 1992, 577-585).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from isthmus.parity.limits import at_least
from isthmus.records import Outcome


@dataclass(frozen=True)
class PairedAccuracy:
    """Accuracies as shares. `difference` is candidate minus reference, within [`low`, `high`] at `confidence`."""

    problems: int
    answers: int
    reference: float
    candidate: float
    only_reference: int
    only_candidate: int
    design_effect: float
    difference: float
    low: float
    high: float
    confidence: float

    def verdict(self, margin: float) -> Outcome:
        """`pass`: not worse by more than `margin`. `fail`: worse by more as counted. `unknown`: too few answers."""
        return at_least(-margin, self.difference, (self.low, self.high), samples=self.problems)

    @property
    def discordance(self) -> float:
        """Share of answers that only one of the two got right, by Laplace's rule: never 0."""
        return (self.only_reference + self.only_candidate + 1) / (self.answers + 2)

    def power(self, margin: float, problems: int | None = None) -> float:
        """How likely a candidate that is exactly as good passes, with this many problems of this kind.

        A normal difference with variance discordance / answers (Liu, Hsueh, Hsieh and Chen, Statistics in Medicine 21,
        2002, 231-245), the answers divided by the design effect.
        """
        answers = self.answers / self.design_effect * (problems or self.problems) / self.problems
        return NormalDist().cdf(margin / math.sqrt(self.discordance / answers) - self._quantile)

    def problems_for(self, power: float, margin: float) -> int:
        """How many problems of this kind an equally good candidate needs to pass with this probability."""
        spread = self._quantile + NormalDist().inv_cdf(power)
        answers = self.discordance * (spread / margin) ** 2
        return math.ceil(answers * self.design_effect * self.problems / self.answers)

    @property
    def _quantile(self) -> float:
        return NormalDist().inv_cdf((1 + self.confidence) / 2)


def compare_answers(reference: list[list[bool]], candidate: list[list[bool]], confidence: float) -> PairedAccuracy:
    """Compare right and wrong answers: a row per problem, as many answers in each, paired by their place."""
    assert reference and [len(row) for row in reference] == [len(row) for row in candidate], "unpaired answers"
    pairs = [list(zip(*rows, strict=True)) for rows in zip(reference, candidate, strict=True)]
    flat = [pair for row in pairs for pair in row]
    both, neither = flat.count((True, True)), flat.count((False, False))
    only_reference, only_candidate = flat.count((True, False)), flat.count((False, True))
    effect = _design_effect(pairs)
    scaled = [count / effect for count in (both, only_candidate, only_reference, neither)]
    difference, low, high = newcombe_interval(*scaled, confidence=confidence)
    return PairedAccuracy(
        problems=len(pairs),
        answers=len(flat),
        reference=(both + only_reference) / len(flat),
        candidate=(both + only_candidate) / len(flat),
        only_reference=only_reference,
        only_candidate=only_candidate,
        design_effect=effect,
        difference=difference,
        low=low,
        high=high,
        confidence=confidence,
    )


def paired_difference(first: list[bool], second: list[bool], confidence: float) -> tuple[float, float, float]:
    """(difference, low, high) of two shares of right answers to the same problems, second minus first."""
    compared = compare_answers([[answer] for answer in first], [[answer] for answer in second], confidence)
    return compared.difference, compared.low, compared.high


def newcombe_interval(
    both: float, only_first: float, only_second: float, neither: float, *, confidence: float
) -> tuple[float, float, float]:
    """(difference, low, high) of two paired proportions, first minus second, from the counts of the 2 x 2 table."""
    n = both + only_first + only_second + neither
    first, second = (both + only_first) / n, (both + only_second) / n
    low_1, high_1 = wilson_interval(first, n, confidence)
    low_2, high_2 = wilson_interval(second, n, confidence)
    phi = _corrected_phi(both, only_first, only_second, neither)
    difference = (only_first - only_second) / n
    below = _square_and_add(first - low_1, high_2 - second, phi)
    above = _square_and_add(high_1 - first, second - low_2, phi)
    return difference, max(difference - below, -1.0), min(difference + above, 1.0)


def wilson_interval(share: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion (JASA 22, 1927, 209-212)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max((centre - half) / (1 + z * z / n), 0.0), min((centre + half) / (1 + z * z / n), 1.0)


def _square_and_add(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def _corrected_phi(a: float, b: float, c: float, d: float) -> float:
    """Correlation of the two answers; a positive one is reduced by the continuity correction n / 2."""
    product = (a + b) * (c + d) * (a + c) * (b + d)
    if product == 0:
        return 0.0
    covariance = a * d - b * c
    if covariance > 0:
        covariance = max(covariance - (a + b + c + d) / 2, 0.0)
    return covariance / math.sqrt(product)


def _design_effect(pairs: list[list[tuple[bool, bool]]]) -> float:
    """Variance of the mean difference, over that of independent pairs: from 1 to the answers per problem."""
    answers = sum(len(row) for row in pairs)
    most = answers / len(pairs)
    differences = [[candidate - reference for reference, candidate in row] for row in pairs]
    mean = sum(map(sum, differences)) / answers
    independent = sum((d - mean) ** 2 for row in differences for d in row) / answers**2
    if independent == 0 or len(pairs) == 1:
        return most
    clustered = sum((sum(row) - len(row) * mean) ** 2 for row in differences) / answers**2
    clustered *= len(pairs) / (len(pairs) - 1)
    return min(max(clustered / independent, 1.0), most)
