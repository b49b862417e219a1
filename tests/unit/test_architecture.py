"""The architecture on random configurations: against transformers, and against its formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter, yarn_apply_mscale

from isthmus.data.corpus import Document
from isthmus.model.config import hf_config, rope_amplitude, rope_inverse_frequencies, softmax_scale
from isthmus.model.model import Model, causal_mask
from isthmus.model.moe import Router, Routing, Trace, sequence_balance_sums
from isthmus.recipe.architecture import DeepseekSection, YarnScaling
from isthmus.recipe.steps import OptimizerSection
from isthmus.trainer.batch import pack
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.step import train_step
from tests.support import reference
from tests.support.against_transformers import (
    in_transformers,
    is_mtp,
    published_gradients,
    randomised,
    to_published_layout,
    transformers_gradients,
)
from tests.support.drawn import architectures, yarn_scalings
from tests.support.plain import mtp_logits
from tests.support.small import GrowingCache, architecture

SEEDS = st.integers(0, 2**31 - 1)


def examples(count: int) -> settings:
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_tokens(seed: int, rows: int, length: int, vocab: int = 61) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def next_token_loss(logits: Tensor, tokens: Tensor, ahead: int = 1) -> Tensor:
    return F.cross_entropy(logits[:, : tokens.shape[1] - ahead].flatten(0, 1), tokens[:, ahead:].flatten())


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's difference is within `tolerance` of its norm, or of a thousandth of the mean norm."""
    assert set(ours) == set(theirs)
    floor = 1e-3 * sum(gradient.norm().item() for gradient in theirs.values()) / len(theirs)
    for name, gradient in theirs.items():
        difference = (ours[name] - gradient).norm().item()
        assert difference <= tolerance * max(gradient.norm().item(), floor), f"{name}: {difference}"


@examples(60)
@given(architectures(), SEEDS)
def test_logits_loss_and_each_gradient_equal_transformers(arch: DeepseekSection, seed: int):
    model = randomised(arch, seed)
    theirs = in_transformers(model)
    for layer in theirs.model.layers:  # transformers keeps 1e-6 here: see the test below
        for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
            if norm is not None:
                norm.variance_epsilon = arch.rms_norm_eps
    tokens = random_tokens(seed, rows=2, length=12)
    logits, expected = model(tokens), theirs(tokens, labels=tokens)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    loss = next_token_loss(logits, tokens)
    torch.testing.assert_close(loss, expected.loss, atol=0, rtol=1e-3)
    loss.backward()
    expected.loss.backward()
    ours = {name: value for name, value in published_gradients(model).items() if not is_mtp(name, arch)}
    assert_same_gradients(ours, transformers_gradients(theirs), tolerance=1e-3)


def test_transformers_keeps_its_own_epsilon_in_the_norms_of_the_latents():
    """transformers and DeepSeek's own code norm the latents of queries and keys with 1e-6 whatever rms_norm_eps says;
    vLLM and SGLang, which serve what we write, take rms_norm_eps, and so do we. At 1e-6, DeepSeek's value, all agree.
    """
    for epsilon in (1e-6, 1e-2):
        model = randomised(architecture(q_lora_rank=20, rms_norm_eps=epsilon), seed=1)
        theirs = in_transformers(model)
        attention = theirs.model.layers[0].self_attn
        assert attention.q_a_layernorm.variance_epsilon == attention.kv_a_layernorm.variance_epsilon == 1e-6
        tokens = random_tokens(1, rows=1, length=12)
        with torch.no_grad():
            difference = (model(tokens) - theirs(tokens).logits).abs().max().item()
        assert difference < 1e-4 if epsilon == 1e-6 else difference > 1e-3


def choose_with_closed_groups_at_zero(arch: DeepseekSection, affinities: list[float], bias: list[float]) -> set[int]:
    """The choice of transformers before its issue 45440 was mended: closed groups compete with 0 instead of -inf."""
    size = arch.n_routed_experts // arch.n_group
    biased = [s + b for s, b in zip(affinities, bias, strict=True)]
    of_group = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(arch.n_group)]
    open_groups = sorted(range(arch.n_group), key=lambda g: -of_group[g])[: arch.topk_group]
    masked = [b if e // size in open_groups else 0.0 for e, b in enumerate(biased)]
    return set(sorted(range(len(masked)), key=lambda e: -masked[e])[: arch.num_experts_per_tok])


def test_closed_groups_stay_closed_when_biases_are_negative():
    """Early releases of transformers 5 fill closed groups with 0.0, which wins against a negative score + bias. The
    installed release does one or the other; ours always does what the paper says, and here that makes a difference.
    """
    arch = architecture(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=6)
    torch.manual_seed(2)
    router = Router(arch)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.normal_(-0.6, 0.3)
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**hf_config(arch, dtype="float32", bos_token_id=0, eos_token_id=1)))
    theirs.load_state_dict(router.state_dict())
    x = torch.randn(200, arch.hidden_size)
    chosen = {"ours": router(x).experts.tolist(), "theirs": theirs(x)[2].tolist()}
    affinities = (x.double() @ router.weight.double().T).sigmoid().tolist()
    bias = router.e_score_correction_bias.double().tolist()
    paper = [set(reference.choose(arch, token, bias)) for token in affinities]
    zeroed = [choose_with_closed_groups_at_zero(arch, token, bias) for token in affinities]
    assert [set(experts) for experts in chosen["ours"]] == paper
    assert [set(experts) for experts in chosen["theirs"]] in (paper, zeroed)
    assert sum(p != z for p, z in zip(paper, zeroed, strict=True)) > 100


@examples(60)
@given(architectures(), st.sampled_from(["sigmoid", "softmax"]), st.sampled_from([-0.8, 0.0]), SEEDS)
def test_routing_equals_a_loop(arch: DeepseekSection, scoring: str, lowest_bias: float, seed: int):
    arch = arch.model_copy(update={"scoring_func": scoring})
    router, x = random_router(arch, seed, lowest_bias)
    routing = router(x)
    affinities = reference.scores(arch, x.double() @ router.weight.double().T)
    torch.testing.assert_close(routing.scores.double(), affinities, atol=1e-6, rtol=1e-5)
    for token, (experts, weights) in enumerate(zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)):
        expected = reference.choose(arch, affinities[token].tolist(), router.e_score_correction_bias.tolist())
        assert set(experts) == set(expected) and len(experts) == arch.num_experts_per_tok
        total = sum(affinities[token, e].item() for e in experts) if arch.norm_topk_prob else 1.0
        for expert, weight in zip(experts, weights, strict=True):
            expected_weight = arch.routed_scaling_factor * affinities[token, expert].item() / total
            assert weight == pytest.approx(expected_weight, rel=1e-5)


def random_router(arch: DeepseekSection, seed: int, lowest_bias: float, tokens: int = 24) -> tuple[Router, Tensor]:
    torch.manual_seed(seed)
    router = Router(arch)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.uniform_(lowest_bias, lowest_bias + 1)
    return router, torch.randn(tokens, arch.hidden_size)


@examples(40)
@given(architectures(num_nextn_predict_layers=0), st.sampled_from(["sigmoid", "softmax"]), SEEDS)
def test_absorbed_attention_equals_naive_in_float64(arch: DeepseekSection, scoring: str, seed: int):
    arch = arch.model_copy(update={"scoring_func": scoring})
    with float64(), torch.no_grad():
        model, tokens = randomised(arch, seed), random_tokens(seed, rows=2, length=13)
        positions = torch.arange(13).expand(2, 13)
        caches, steps = [GrowingCache() for _ in range(arch.num_hidden_layers)], []
        for start, end in ((0, 7), (7, 8), (8, 13)):
            steps.append(model.hidden(tokens[:, start:end], positions[:, start:end], caches=caches))
        naive = model.hidden(tokens)
    assert caches[0].entries.shape == (2, 13, arch.kv_lora_rank + arch.qk_rope_head_dim)
    torch.testing.assert_close(torch.cat(steps, dim=1), naive, atol=1e-10, rtol=1e-10)


@examples(20)
@given(
    architectures(num_nextn_predict_layers=1),
    st.sampled_from(["sigmoid", "softmax"]),
    st.sampled_from([None, 0.05]),
    SEEDS,
)
def test_multi_token_prediction_equals_its_formulas_in_float64(
    arch: DeepseekSection, scoring: str, limit: float | None, seed: int
):
    """Logits of both heads, and the gradient of each tensor under the loss of the second one alone."""
    arch = arch.model_copy(update={"scoring_func": scoring, "swiglu_limit": limit})
    with float64():
        model, tokens = randomised(arch, seed), random_tokens(seed, rows=1, length=8)
        states = model.hidden(tokens)
        logits = mtp_logits(model, states, tokens, torch.arange(8)[None], causal_mask(8))
        weights = double_weights(model)
        expected = reference.mtp_logits(weights, arch, tokens[0])[None]
        torch.testing.assert_close(
            model.logits(states)[0], reference.logits(weights, arch, tokens[0]), atol=1e-9, rtol=1e-9
        )
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
        next_token_loss(logits, tokens, ahead=2).backward()
        next_token_loss(expected, tokens, ahead=2).backward()
        ours = published_gradients(model)
    theirs = {
        name: torch.zeros_like(weights[name]) if weights[name].grad is None else weights[name].grad for name in ours
    }
    assert_same_gradients(ours, theirs, tolerance=1e-8)
    assert ours["model.embed_tokens.weight"].norm() > 0
    assert arch.tie_word_embeddings or ours["lm_head.weight"].norm() > 0
    assert ours["model.norm.weight"].norm() == 0, "the state is taken before the final norm"


def double_weights(model: Model) -> dict[str, Tensor]:
    """Leaves in float64 under the published names; a tied head is the embedding itself."""
    weights = {name: value.detach().double().clone().requires_grad_() for name, value in model.state_dict().items()}
    if model.architecture.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


@examples(60)
@given(architectures(), yarn_scalings(all_dim=st.sampled_from([0.0, 0.5, 1.0])))
def test_yarn_equals_its_formulas_and_transformers(arch: DeepseekSection, scaling: YarnScaling):
    arch = arch.model_copy(update={"rope_scaling": scaling})
    assert rope_inverse_frequencies(arch) == pytest.approx(reference.inverse_frequencies(arch), rel=1e-12)
    temperature = reference.yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    head = arch.qk_nope_head_dim + arch.qk_rope_head_dim
    assert softmax_scale(arch) == pytest.approx(temperature**2 / math.sqrt(head), rel=1e-12)
    amplitude = reference.yarn_mscale(scaling.factor, scaling.mscale) / temperature
    assert rope_amplitude(arch) == pytest.approx(amplitude, rel=1e-12)

    config = DeepseekV3Config(**hf_config(arch, dtype="float32", bos_token_id=0, eos_token_id=1))
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(rope_inverse_frequencies(arch)), frequencies, atol=0, rtol=1e-5)
    assert softmax_scale(arch) == pytest.approx(yarn_apply_mscale(config.rope_parameters, head**-0.5), rel=1e-9)
    if scaling.mscale_all_dim:  # without it transformers leaves mscale out, DeepSeek's code does not
        assert rope_amplitude(arch) == pytest.approx(attention_factor, rel=1e-9)


def test_deepseek_v3_turns_its_slow_pairs_forty_times_slower():
    """The published values: of 32 pairs the first 10 keep their frequency, those from 23 on are divided by 40."""
    scaling = YarnScaling(factor=40.0, original_max_position_embeddings=4096)
    plain = architecture(qk_rope_head_dim=64, qk_nope_head_dim=128, rope_theta=10000.0)
    yarn = plain.model_copy(update={"rope_scaling": scaling})
    ratio = [b / a for a, b in zip(rope_inverse_frequencies(plain), rope_inverse_frequencies(yarn), strict=True)]
    assert ratio[:11] == pytest.approx([1.0] * 11) and ratio[23:] == pytest.approx([1 / 40] * 9)
    assert ratio[10:24] == sorted(ratio[10:24], reverse=True) and ratio[16] == pytest.approx(1 - 6 / 13 * 39 / 40)
    assert rope_amplitude(yarn) == 1.0
    assert softmax_scale(yarn) == pytest.approx(192**-0.5 * 1.3688879454113936**2)


@examples(40)
@given(architectures(), st.sampled_from(["sigmoid", "softmax"]), SEEDS)
def test_balance_loss_equals_the_papers_sums_without_the_padding(arch: DeepseekSection, scoring: str, seed: int):
    arch = arch.model_copy(update={"scoring_func": scoring})
    router, x = random_router(arch, seed, lowest_bias=-0.5)
    routing = router(x)
    sequence = torch.randint(-1, 3, (len(x),), generator=torch.Generator().manual_seed(seed))
    expected = sum(papers_balance(routing, (sequence == s).nonzero().flatten().tolist()) for s in range(3))
    loss = sequence_balance_sums(routing, sequence, 3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    padded = (sequence < 0).nonzero().flatten()
    routing.scores.retain_grad()
    loss.backward()
    gradient = routing.scores.grad
    assert gradient is not None and torch.all(gradient[padded] == 0) and torch.all(gradient[sequence >= 0].isfinite())
    assert router.weight.grad is not None and router.weight.grad.isfinite().all()


def papers_balance(routing: Routing, tokens: list[int]) -> float:
    """Equations 17 to 20 of the DeepSeek-V3 report for one sequence, without alpha."""
    scores, top_k = routing.scores.double().tolist(), routing.experts.shape[1]
    experts, total = len(scores[0]), 0.0
    chosen = {t: sorted(range(experts), key=lambda i, t=t: -scores[t][i])[:top_k] for t in tokens}
    for i in range(experts):
        frequency = experts / (top_k * len(tokens)) * sum(i in chosen[t] for t in tokens) if tokens else 0.0
        probability = sum(scores[t][i] / sum(scores[t]) for t in tokens) / len(tokens) if tokens else 0.0
        total += frequency * probability
    return total


@examples(40)
@given(architectures(), SEEDS)
def test_load_counts_the_real_tokens_of_each_expert(arch: DeepseekSection, seed: int):
    router, x = random_router(arch, seed, lowest_bias=-0.5)
    routing = router(x)
    real = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < 0.7
    for marked, tokens in ((None, range(len(x))), (real, real.nonzero().flatten().tolist())):
        counts = [sum(e in routing.experts[t].tolist() for t in tokens) for e in range(arch.n_routed_experts)]
        assert routing.load(marked).tolist() == counts


@pytest.mark.parametrize("rows_at_once", [None, 1])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_step_balances_by_what_each_document_does_alone(scoring: str, rows_at_once: int | None):
    """Neither packing, nor padding, nor accumulation changes the balance loss or how the routing biases move."""
    arch = architecture(scoring_func=scoring)
    model = randomised(arch, seed=4, lowest_bias=-0.5)
    texts = [random_tokens(length, rows=1, length=length, vocab=97) for length in (9, 20, 14, 30, 6)]
    batch = pack([Document(text[0].tolist(), 2) for text in texts], 30)
    assert (batch.document < 0).any() and len(batch.tokens) > 1
    loads, balance, before = torch.zeros(len(model.routers()), arch.n_routed_experts), [], biases(model)
    for text in texts:
        trace = Trace()
        length = text.shape[1]
        hidden = model.hidden(text, trace=trace)
        model.mtp_states(hidden, text, torch.arange(length)[None], causal_mask(length), trace)
        for layer, routing in enumerate(trace.routings):
            seen = length - 1 if layer == len(trace.routings) - 1 else length  # the last token has no next one
            balance.append(papers_balance(routing, list(range(seen))))
            for expert in routing.experts[:seen].flatten().tolist():
                loads[layer, expert] += 1
    optimizer = Optimizer(model, OptimizerSection(name="adamw", learning_rate=1e-3), total_steps=1)
    objective = SimpleNamespace(mtp_weight=0.1, balance_alpha=1e-2, bias_update_speed=0.01)
    losses, _ = train_step(model, optimizer, batch, objective, 0, rows_at_once=rows_at_once)
    assert losses.balance_loss == pytest.approx(sum(balance) / len(balance), rel=1e-4)
    assert [load.tolist() for load in losses.loads] == loads.tolist()
    for moved, old, load in zip(biases(model), before, loads.tolist(), strict=True):
        mean = sum(load) / len(load)
        expected = [b + 0.01 * ((mean > count) - (mean < count)) for b, count in zip(old.tolist(), load, strict=True)]
        assert moved.dtype == torch.float32 and moved.tolist() == pytest.approx(expected, abs=1e-7)


def biases(model: Model) -> list[Tensor]:
    return [router.e_score_correction_bias.clone() for router in model.routers()]


def test_published_layout_is_the_reverse_of_transformers_layout():
    model = randomised(architecture(), seed=3)
    theirs = in_transformers(model)
    state = to_published_layout(theirs.state_dict())
    ours = {name: value for name, value in model.state_dict().items() if not is_mtp(name, model.architecture)}
    assert set(state) == set(ours)
    assert all(torch.equal(state[name], value) for name, value in ours.items())
