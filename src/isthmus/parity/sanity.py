"""Whether the source's own model makes sense of the golden sequences, before anything is compared with it.

A conversion that is faithful to garbage passes every comparison. Garbage shows in what the source itself says of the
golden tokens: no numbers, one probability for all tokens, or less than the frequencies of the tokens alone would say.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from isthmus.parity.capture import GoldenSet
from isthmus.parity.gate import finite, reach
from isthmus.parity.tokens import GoldenSequence, distinct, interval_of_mean, lengths_of, numbered, of_sequences
from isthmus.records import Check, CheckOutcome

NAME = "the source's own model makes sense of the golden prompts"
UNIFORM = 0.01
"""Nats around -log(vocabulary) within which each golden token lies if the distributions are uniform. A model that was
not trained at all varies by a tenth of a nat."""
MARGIN = 1.0
"""Nats per token by which a unigram has to be better before it refuses: it is one of the very text, and of prompts that
are all alike, which no model has seen before, it knows more than a model can. Damage costs several nats."""
TEXT = 0.1
"""Nats per token by which frequencies have to beat a uniform guess before they say something of a text. Random tokens
have none to tell."""


def check_sanity(golden: GoldenSet, vocabulary: int, confidence: float = 0.95) -> Check:
    """The log-probabilities that the trained model gave when it was captured, against those of a uniform guess and of a
    unigram of the same text.

    `fail`: a number is not finite, the distributions are uniform, or the unigram is better by more than `MARGIN`, by
    the whole interval over the sequences. Where it is better and that does not tell, it is a caution. On random tokens
    only the first two are judged.
    """
    listed = golden.listed.golden_sequences()
    kept = distinct(listed)
    logprobs = of_sequences(golden.token_logprobs().trained, listed, kept)
    sequences = [listed[place] for place in kept]
    uniform = -math.log(vocabulary)
    if not len(logprobs):
        return _check("unknown", "there is no golden token to look at")
    if lost := int((~torch.isfinite(logprobs)).sum()):
        words = f"for {lost:,} of {len(logprobs):,} golden tokens it has no number: the source is damaged"
        return _check("fail", words)
    if bool(((logprobs - uniform).abs() < UNIFORM).all()):
        words = f"it holds all {vocabulary:,} tokens for equally likely, whatever stands before: the source is damaged"
        return _check("fail", words)
    of_unigram = unigram_logprobs(sequences, vocabulary)
    if golden.listed.synthetic or float(of_unigram.mean()) < uniform + TEXT:
        return _check("pass", "its numbers are finite and not uniform; random tokens tell nothing more of it")
    gain = logprobs - of_unigram
    mean, lengths = float(gain.mean()), lengths_of(sequences)
    interval = interval_of_mean(gain, numbered(lengths), len(sequences), confidence)
    most = reach(mean, interval, len(sequences), confidence)
    outcome: CheckOutcome = "fail" if most is not None and most[1] < -MARGIN else "pass" if mean > 0 else "caution"
    beside = f"{-float(logprobs.mean()):.3g} nats per token, {-float(of_unigram.mean()):.3g} by frequencies of the text"
    words = {
        "pass": f"{beside} alone",
        "caution": f"{beside} alone: give more golden prompts, best of the model's own text",
        "fail": f"{beside} alone: the source makes less of its prompts than a table of frequencies. Either its weights "
        "are damaged, or the prompts are nothing that it was trained on: give some of its own text",
    }
    source = f"{len(sequences)} golden sequences, {len(gain)} tokens: log-probability by the source minus by a unigram"
    figure = finite(mean, "nats/token", source, rehearsed=False, interval=interval)
    return _check(outcome, words[outcome]).model_copy(update={"figure": figure})


def unigram_logprobs(sequences: list[GoldenSequence], vocabulary: int) -> Tensor:
    """What the frequencies of a text say of its completion tokens [N], in float64: each token by all the others.

    Frequencies are smoothed towards a uniform guess by the number of kinds T among n tokens, as (count + T / V) /
    (n + T): Witten and Bell 1991, in the form of Chen and Goodman 1999.
    """
    text = [token for one in sequences for token in (*one.prompt, *one.completion)]
    counts = Counter(text)
    kinds, others = len(counts), len(text) - 1
    found = [
        math.log((counts[token] - 1 + kinds / vocabulary) / (others + kinds))
        for one in sequences
        for token in one.completion
    ]
    return torch.tensor(found, dtype=torch.float64)


def _check(outcome: CheckOutcome, detail: str) -> Check:
    return Check(layer="source", name=NAME, outcome=outcome, detail=detail)
