"""What a batch-invariant engine computes is known to the last bit, and one bit more or less is seen."""

from __future__ import annotations

import pytest
import torch

from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.replica import Replica, exact_for
from isthmus.formats import get_format
from isthmus.formats.files.golden import TokenScore
from isthmus.model.model import Model
from isthmus.parity.engine import BITS, DISTANCE, check_engine, compare_engine, spot_check
from isthmus.parity.tokens import GoldenSequence
from isthmus.recipe.schema import EngineOptions
from tests.support.engine_bundle import ask, finished, run_core
from tests.support.small import tiny_architecture
from tests.support.small_dense import dense_architecture, randomised

ARCHITECTURE = tiny_architecture(vocab_size=31, initializer_range=0.3)
PROMPTS = [[5, 17, 30], [8] * 21, [4], [3, 9, 27, 1, 13, 29, 7]]
NO_EOS, LONGEST = -1, 48


def made(name: str, nudged: str | None = None) -> Model:
    """A tiny model in a format; of the tensor `nudged` the first value is moved by a last bit of fp32."""
    state = Model(ARCHITECTURE).initialise(0).state_dict()
    tensors = get_format(name).export(state, ARCHITECTURE)
    if nudged is not None:
        first = tensors[nudged].flatten()[:1]
        tensors[nudged].flatten()[:1] = torch.nextafter(first, torch.full_like(first, torch.inf))
    return get_format(name).build(ARCHITECTURE, tensors)


def dense(_name: str) -> Model:
    return randomised(dense_architecture("qwen2"), 1).eval().requires_grad_(False)


def core_of(model: Model, *, invariant: bool = True, block_size: int = 16) -> Core:
    return Core(
        model, eos_id=NO_EOS, length=LONGEST, options=EngineOptions(batch_invariant=invariant, block_size=block_size)
    )


def answers(core: Core, prompts: list[list[int]] = PROMPTS) -> list[tuple[GoldenSequence, list[float]]]:
    """Greedy answers of an engine that has other work beside them, with the log-probabilities it tells."""
    crowd, _ = ask([[i, 20] for i in range(4)], 9, seed=99, n=2, temperature=1.5)
    request, events = ask(prompts, 12, temperature=0.0)
    run_core(core, crowd, request)
    return [
        (GoldenSequence(prompt, one.tokens), one.logprobs)
        for prompt, one in zip(prompts, finished(events), strict=True)
    ]


@pytest.mark.parametrize(("build", "name"), [(made, "w8a8"), (made, "fp32"), (made, "mxfp8"), (dense, "qwen2")])
def test_a_batch_invariant_engine_in_a_crowd_gives_the_bits_of_the_replica(build, name):
    core = core_of(build(name))
    said = answers(core)
    exact = exact_for(core.bits, lambda: build(name), [sequence for sequence, _ in said])
    assert exact is not None
    expected = exact([sequence for sequence, _ in said])
    assert expected.tolist() == [value for _, logprobs in said for value in logprobs]


def test_bits_are_not_known_where_the_batch_or_other_kernels_decide_them():
    assert core_of(made("w8a8"), invariant=False).bits is None
    assert exact_for(None, lambda: made("w8a8"), []) is None
    assert exact_for("other kernels", lambda: made("w8a8"), []) is None
    assert exact_for(core_of(made("mxfp8"), block_size=4).bits, lambda: made("mxfp8"), []) is None
    compiled = Replica(made("w8a8"), LONGEST)
    if core_of(made("w8a8")).kernels == "native":
        assert compiled.bits != Replica(made("mxfp8"), LONGEST).bits, "torch's operators are not the compiled layers"


def test_a_last_bit_of_one_weight_is_seen_which_twins_cannot_see():
    nudged = core_of(made("fp32", nudged="model.norm.weight"))
    said = answers(nudged)
    exact = exact_for(nudged.bits, lambda: made("fp32"), [sequence for sequence, _ in said])

    def score(asked: list[list[int]]) -> list[list[TokenScore]]:
        told = Replica(made("fp32", nudged="model.norm.weight"), LONGEST)
        rows = [told.logprobs([GoldenSequence(tokens[:1], tokens[1:])]).tolist() for tokens in asked]
        return [[TokenScore(value, 0, value) for value in row] for row in rows]

    golden = [sequence for sequence, _ in said]
    found = compare_engine(score, lambda: made("fp32"), "fp32", golden, None, exact=exact)
    outcome = {check.name: check.outcome for check in check_engine(found, "a server", None, "sequences of")}
    assert (outcome[BITS], outcome[DISTANCE]) == ("fail", "pass")

    trained = made("fp32")
    by_twins = spot_check(lambda: made("fp32"), "fp32", trained, said, 0.01, seed=0)
    by_bits = spot_check(lambda: made("fp32"), "fp32", trained, said, 0.01, seed=0, exact=exact)
    assert not by_twins.is_over and by_bits.is_over and by_bits.limit == 0
    healthy = answers(core_of(made("fp32")))
    assert not spot_check(lambda: made("fp32"), "fp32", trained, healthy, 0.01, seed=0, exact=exact).is_over
