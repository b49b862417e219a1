"""Faults of crossings, each planted where it happens in the field.

`TENSOR_FAULTS` change stored tensors: by an exporter, on the way, or by a target's loader. `RUNTIME_FAULTS` change what
the built model computes. `CONFIG_FAULTS` change config.json. A fault that does not apply to a model gives None.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.formats import get_format
from isthmus.formats.files.bundle import Bundle
from isthmus.model.attention import LatentAttention, RMSNorm, Rotation
from isthmus.model.dense import GroupedQueryAttention, rotate_halves
from isthmus.model.model import Model
from isthmus.model.moe import MixtureOfExperts, Router
from isthmus.model.mtp import MtpLayer
from isthmus.parity.target import build_target
from isthmus.recipe.architecture import DeepseekSection
from tests.support.gate_models import RandomModel
from tests.support.plain import mtp_logits

Stored = dict[str, Tensor]
UNSYNCED_STEPS = 20


@dataclass(frozen=True)
class Subject:
    """What a fault is planted in: a model, its format, and its tensors as they are stored when nothing is wrong."""

    model: RandomModel
    format: str
    stored: Stored

    @property
    def deepseek(self) -> DeepseekSection | None:
        architecture = self.model.architecture
        return architecture if isinstance(architecture, DeepseekSection) else None

    @property
    def mtp_prefix(self) -> str | None:
        architecture = self.model.architecture
        return f"model.layers.{architecture.num_hidden_layers}" if architecture.num_nextn_predict_layers else None

    def export(self, name: str, tensor: Tensor) -> Stored:
        """A source tensor as the format stores it."""
        return get_format(self.format).export_one(name, tensor, self.model.architecture)

    def build(self, stored: Stored | None = None, dtype: torch.dtype = torch.float32) -> Model:
        """The model of a target; in fp32 it is the emulator."""
        return build_target(self.bundle(stored), dtype=dtype)

    def bundle(self, stored: Stored | None = None) -> Bundle:
        """A bundle of these tensors in memory."""
        return Bundle(Path(), self.format, self.model.architecture, dict(stored or self.stored))

    def plain(self, dtype: torch.dtype) -> Model:
        """The target's model from weights in bf16."""
        stored = get_format("bf16").export(self.model.state, self.model.architecture)
        return build_target(Bundle(Path(), "bf16", self.model.architecture, stored), dtype=dtype)


@dataclass(frozen=True)
class Plant:
    """A planted fault. `where` is the path of the module or operator at fault; `operators` are names it may be given.

    `several` marks a fault that has no single module.
    """

    where: str
    detail: str
    stored: Stored | None = None
    patch: Callable[[Model], None] | None = None
    config: dict[str, Any] | None = None
    operators: frozenset[str] = frozenset()
    several: bool = False

    def build(self, subject: Subject, dtype: torch.dtype = torch.float32) -> Model:
        """The target's model with the fault in it."""
        model = subject.build(self.stored, dtype)
        if self.patch is not None:
            self.patch(model)
        return model


def module_of(tensor: str) -> str:
    """Path of the module that a stored tensor belongs to."""
    return tensor.rpartition(".")[0]


def effective(subject: Subject, plant: Plant) -> bool:
    """Whether the fault changes a stored tensor, or by more than 1e-6 what the model computes on random prompts."""
    if plant.stored is not None and plant.patch is None:
        return _differ(subject.stored, plant.stored)
    prompts = torch.tensor(subject.model.prompts(salt=1000))
    expected, found = outputs(subject.build(), prompts), outputs(plant.build(subject), prompts)
    if not torch.isfinite(found).all():
        return True
    return bool((found - expected).norm() > 1e-6 * expected.norm())


@torch.inference_mode()
def outputs(model: Model, prompts: Tensor) -> Tensor:
    """Logits of every position, those of the MTP layer beside them."""
    hidden = model.hidden(prompts)
    parts = [model.logits(hidden).flatten()]
    if model.mtp_layer is not None:
        positions = torch.arange(prompts.shape[1]).expand(prompts.shape)
        mask = torch.full((prompts.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        parts.append(mtp_logits(model, hidden, prompts, positions, mask).flatten())
    return torch.cat(parts)


def _differ(a: Stored, b: Stored) -> bool:
    return a.keys() != b.keys() or any(_bits(a[name]).ne(_bits(b[name])).any() for name in a if _same_form(a, b, name))


def _same_form(a: Stored, b: Stored, name: str) -> bool:
    return (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


# Faults in stored tensors


def lost_scale_row(subject: Subject, draw: random.Random) -> Plant | None:
    """The scales of the rows after the last whole block are zero: 576 rows are 4.5 blocks of 128."""
    names = [name for name in _scales(subject) if len(subject.stored[name]) > 1]
    if not names:
        return None
    name = draw.choice(names)
    scale = subject.stored[name].clone()
    rows = 1 if scale.dim() == 2 and scale.shape[1] > 1 else len(scale) % 128 or 128
    scale[-min(rows, len(scale) // 2) :] = 0
    return _changed(subject, name, scale, f"last scale rows of {name} are 0")


def floored_scales(subject: Subject, draw: random.Random) -> Plant | None:
    """Scales cut to powers of two, as by an exponent-only scale path."""
    names = [name for name in _scales(subject) if subject.stored[name].is_floating_point()]
    if not names:
        return None
    name = draw.choice(names)
    scale = subject.stored[name]
    floored = torch.exp2(scale.float().log2().floor()).to(scale.dtype)
    return _changed(subject, name, floored, f"{name} floored to powers of two")


def flipped_bit(subject: Subject, draw: random.Random) -> Plant | None:
    name = draw.choice(_weights(subject))
    flat = _bits(subject.stored[name]).flatten().clone()
    byte, bit = draw.randrange(len(flat)), draw.randrange(8)
    flat[byte] ^= 1 << bit
    tensor = subject.stored[name]
    changed = flat.view(tensor.dtype).view(tensor.shape)
    return _changed(subject, name, changed, f"bit {bit} of byte {byte} of {name} flipped")


def swapped_experts(subject: Subject, draw: random.Random) -> Plant | None:
    architecture = subject.deepseek
    layers = sorted({name.partition(".experts.")[0] for name in subject.stored if ".experts." in name})
    if architecture is None or not layers:
        return None
    prefix = f"{draw.choice(layers)}.experts"
    first, second = draw.sample(range(architecture.n_routed_experts), 2)
    stored = dict(subject.stored)
    for name in subject.stored:
        if name.startswith(f"{prefix}.{first}."):
            other = name.replace(f"{prefix}.{first}.", f"{prefix}.{second}.")
            stored[name], stored[other] = subject.stored[other], subject.stored[name]
    return Plant(prefix, f"experts {first} and {second} of {prefix} swapped", stored=stored)


def swapped_tensors(subject: Subject, draw: random.Random) -> Plant | None:
    """Two tensors of one form, of any module, in each other's place."""
    first = draw.choice(_weights(subject))
    same = [n for n in _weights(subject) if n != first and _form(subject.stored[n]) == _form(subject.stored[first])]
    if not same:
        return None
    second = draw.choice(same)
    stored = {**subject.stored, first: subject.stored[second], second: subject.stored[first]}
    return Plant(module_of(first), f"{first} and {second} swapped", stored=stored, several=True)


def stale_module(subject: Subject, draw: random.Random) -> Plant | None:
    """One weight matrix is that of one version ago."""
    name = draw.choice(_matrices(subject))
    stored = {**subject.stored, **subject.export(name, subject.model.previous[name])}
    return Plant(module_of(name), f"{name} is one version old", stored=stored)


def stale_version(subject: Subject, draw: random.Random) -> Plant | None:
    """All weights are those of one version ago."""
    stored = get_format(subject.format).export(subject.model.previous, subject.model.architecture)
    return Plant("model", "all weights are one version old", stored=stored, several=True)


def unsynced_mtp(subject: Subject, draw: random.Random) -> Plant | None:
    """The MTP layer has the weights from before the run."""
    prefix = subject.mtp_prefix
    if prefix is None:
        return None
    stored, state, previous = dict(subject.stored), subject.model.state, subject.model.previous
    for name in state:
        if name.startswith(f"{prefix}."):
            stored |= subject.export(name, state[name] + UNSYNCED_STEPS * (previous[name] - state[name]))
    return Plant(prefix, f"{prefix} was never synced", stored=stored)


def double_transposed(subject: Subject, draw: random.Random) -> Plant | None:
    """A square matrix, transposed once too often: no shape tells."""
    square = [name for name in _matrices(subject) if len(set(subject.model.state[name].shape)) == 1]
    if not square:
        return None
    name = draw.choice(square)
    stored = {**subject.stored, **subject.export(name, subject.model.state[name].t().contiguous())}
    return Plant(module_of(name), f"{name} transposed", stored=stored)


def stored_in_bf16(subject: Subject, draw: random.Random) -> Plant | None:
    """One quantised matrix is stored in bf16, without its scales."""
    names = [name for name in _matrices(subject) if _is_quantised(subject, name)]
    if not names:
        return None
    name = draw.choice(names)
    dropped = subject.export(name, subject.model.state[name]).keys() | {name}
    stored = {key: tensor for key, tensor in subject.stored.items() if key not in dropped}
    stored[name] = subject.model.state[name].bfloat16()
    return Plant(module_of(name), f"{name} left in bf16", stored=stored)


TENSOR_FAULTS = {
    "last scale row lost": lost_scale_row,
    "scales floored to powers of two": floored_scales,
    "one weight bit flipped": flipped_bit,
    "experts swapped": swapped_experts,
    "tensors swapped": swapped_tensors,
    "stale weights of one module": stale_module,
    "stale weights of one version ago": stale_version,
    "MTP layer never synced": unsynced_mtp,
    "square matrix transposed twice": double_transposed,
    "layer silently left in bf16": stored_in_bf16,
}


def _changed(subject: Subject, name: str, tensor: Tensor, detail: str) -> Plant:
    return Plant(module_of(name), detail, stored={**subject.stored, name: tensor})


def _scales(subject: Subject) -> list[str]:
    return [name for name in subject.stored if "weight_scale" in name]


def _weights(subject: Subject) -> list[str]:
    return [name for name, tensor in subject.stored.items() if name.endswith(".weight") and tensor.dim() == 2]


def _matrices(subject: Subject) -> list[str]:
    return [name for name, tensor in subject.model.state.items() if tensor.dim() == 2 and name in subject.stored]


def _form(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _is_quantised(subject: Subject, name: str) -> bool:
    return subject.stored[name].element_size() == 1


# Faults in what the target computes


def clamp_lost(subject: Subject, draw: random.Random) -> Plant | None:
    def lost(module: Any) -> None:
        module.limit = None

    return _patched(subject, draw, lambda m: getattr(m, "limit", None) is not None, lost, "clamp limit lost")


def wrong_rope_layout(subject: Subject, draw: random.Random) -> Plant | None:
    """Halves for interleaved pairs on the keys, or the reverse in a dense model."""
    if subject.deepseek is None:
        return _patched(subject, draw, _is(GroupedQueryAttention), _interleave_dense, "rope pairs for halves", ROPE)
    return _patched(subject, draw, _is(LatentAttention), _halve_latents, "rope halves for interleaved keys", ROPE)


def wrong_position(subject: Subject, draw: random.Random) -> Plant | None:
    """Keys are rotated as if one position later."""
    if subject.deepseek is None:
        return None
    return _patched(subject, draw, _is(LatentAttention), _shift_latents, "keys one position late", ROPE)


def router_bias_lost(subject: Subject, draw: random.Random) -> Plant | None:
    def lost(router: Any) -> None:
        inner = router.choose
        router.choose = lambda biased: inner(biased - router.e_score_correction_bias)

    return _patched(subject, draw, _is(Router), lost, "router bias lost")


def mask_of_zero(subject: Subject, draw: random.Random) -> Plant | None:
    """Closed groups get the score 0.0 where they should get -inf."""
    return _patched(subject, draw, _grouped, _choose_with_zeros, "mask 0.0 for -inf")


def groups_ignored(subject: Subject, draw: random.Random) -> Plant | None:
    def ignored(router: Any) -> None:
        router.topk_group = router.n_group

    return _patched(subject, draw, _grouped, ignored, "expert groups ignored")


def scaling_lost(subject: Subject, draw: random.Random) -> Plant | None:
    def lost(router: Any) -> None:
        router.scaling = 1.0

    return _patched(subject, draw, lambda m: isinstance(m, Router) and m.scaling != 1.0, lost, "routed scaling lost")


def normalisation_ignored(subject: Subject, draw: random.Random) -> Plant | None:
    def ignored(router: Any) -> None:
        router.normalise = False

    return _patched(subject, draw, lambda m: isinstance(m, Router) and m.normalise, ignored, "norm_topk_prob ignored")


def shared_expert_not_scaled(subject: Subject, draw: random.Random) -> Plant | None:
    """Kernels for fp16 divide the shared expert by the routed scaling and multiply the sum: one of the two is lost."""
    architecture = subject.deepseek
    if architecture is None or architecture.routed_scaling_factor == 1.0:
        return None
    factor = draw.choice([architecture.routed_scaling_factor, 1 / architecture.routed_scaling_factor])

    def scale(mixture: Any) -> None:
        inner = mixture.shared_experts.forward
        mixture.shared_experts.forward = lambda x: inner(x) * factor

    plant = _patched(subject, draw, _is(MixtureOfExperts), scale, f"shared expert times {factor:.3g}")
    return plant and replace(plant, where=f"{plant.where}.shared_experts")


def eps_changed(subject: Subject, draw: random.Random) -> Plant | None:
    eps = draw.choice([1e-5, 1e-3]) if subject.model.architecture.rms_norm_eps < 1e-5 else draw.choice([1e-6, 1e-3])

    def change(norm: Any) -> None:
        norm.eps = eps

    return _patched(subject, draw, _is(RMSNorm), change, f"eps is {eps}", frozenset({"norm"}))


def yarn_scale_lost(subject: Subject, draw: random.Random) -> Plant | None:
    """Attention scores without the square of YaRN's mscale."""

    def lost(attention: Any) -> None:
        attention.scale = (attention.nope + attention.rope) ** -0.5

    if subject.deepseek is None or subject.deepseek.rope_scaling is None:
        return None
    return _patched(subject, draw, _is(LatentAttention), lost, "softmax scale without mscale", ATTENTION)


def mtp_order_swapped(subject: Subject, draw: random.Random) -> Plant | None:
    """The hidden state before the embedding, the order of the paper's text."""

    def swap(layer: Any) -> None:
        def join(next_embedding: Tensor, hidden: Tensor) -> Tensor:
            return layer.eh_proj(torch.cat((layer.hnorm(hidden), layer.enorm(next_embedding)), dim=-1))

        layer.join = join

    return _patched(subject, draw, _is(MtpLayer), swap, "eh_proj reads hidden state first", frozenset({"eh_proj"}))


def computed_in_bf16(subject: Subject, draw: random.Random) -> Plant | None:
    """The target computes one module with bf16 weights where the bundle has quantised ones."""
    quantised, plain = dict(subject.build().named_modules()), dict(subject.plain(torch.float32).named_modules())
    paths = [path for path in plain if path in quantised and type(plain[path]) is not type(quantised[path])]
    if not paths:
        return None
    path = draw.choice(paths)

    def put(model: Model) -> None:
        parent, _, name = path.rpartition(".")
        dtype = model.model.embed_tokens.weight.dtype
        setattr(model.get_submodule(parent), name, subject.plain(dtype).get_submodule(path))

    return Plant(path, f"{path} computes in bf16", patch=put)


ROPE = frozenset({"rope", "rotary", "rotation", "rotate", "latents", "key"})
ATTENTION = frozenset({"attention", "softmax", "scores", "context", "core"})
RUNTIME_FAULTS = {
    "clamp limit lost": clamp_lost,
    "rope halves for interleaved": wrong_rope_layout,
    "wrong position offset": wrong_position,
    "router bias lost": router_bias_lost,
    "mask 0.0 for -inf": mask_of_zero,
    "expert groups ignored": groups_ignored,
    "routed scaling factor lost": scaling_lost,
    "norm_topk_prob ignored": normalisation_ignored,
    "shared expert not scaled": shared_expert_not_scaled,
    "eps changed": eps_changed,
    "softmax scale without mscale": yarn_scale_lost,
    "MTP eh_proj order swapped": mtp_order_swapped,
    "layer silently computed in bf16": computed_in_bf16,
}


def _patched(
    subject: Subject,
    draw: random.Random,
    fits: Callable[[nn.Module], bool],
    change: Callable[[Any], None],
    detail: str,
    operators: frozenset[str] = frozenset(),
) -> Plant | None:
    paths = [path for path, module in subject.build().named_modules() if fits(module)]
    if not paths:
        return None
    path = draw.choice(paths)
    return Plant(path, f"{path}: {detail}", patch=lambda model: change(model.get_submodule(path)), operators=operators)


def _is(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, kinds)


def _grouped(module: nn.Module) -> bool:
    return isinstance(module, Router) and module.topk_group < module.n_group


def _halve_latents(attention: Any) -> None:
    _with_keys(attention, lambda key, rotation: rotate_halves(key.unsqueeze(2), rotation).squeeze(2))


def _shift_latents(attention: Any) -> None:
    inner = attention.latents

    def latents(x: Tensor, rotation: Rotation) -> Tensor:
        later = Rotation(*(torch.cat((part[:, 1:], part[:, -1:]), dim=1) for part in rotation))
        return inner(x, later)

    attention.latents = latents


def _with_keys(attention: Any, turn: Callable[[Tensor, Rotation], Tensor]) -> None:
    def latents(x: Tensor, rotation: Rotation) -> Tensor:
        latent, key = attention.kv_a_proj_with_mqa(x).split([attention.rank, attention.rope], dim=-1)
        return torch.cat((attention.kv_a_layernorm(latent), turn(key, rotation)), dim=-1)

    attention.latents = latents


def _interleave_dense(attention: Any) -> None:
    """Keys in the row order of interleaved pairs: the permutation between the two layouts was forgotten."""
    inner = attention.project

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = inner(x)
        pairs = key.unflatten(-1, (-1, attention.head_size // 2, 2)).transpose(-1, -2)
        return query, pairs.flatten(-3), value

    attention.project = project


def _choose_with_zeros(router: Any) -> None:
    def choose(biased: Tensor) -> Tensor:
        grouped = biased.unflatten(-1, (router.n_group, -1))
        score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = score.topk(router.topk_group, dim=-1).indices
        closed = torch.ones_like(score, dtype=torch.bool).scatter(-1, kept, False)
        masked = grouped.masked_fill(closed.unsqueeze(-1), 0.0).flatten(-2)
        return masked.topk(router.top_k, dim=-1).indices

    router.choose = choose


# Faults in config.json


def config_fault(key: str, change: Callable[[Any, random.Random], Any]) -> Callable[..., Plant | None]:
    """A value of config.json that was changed; None where it says nothing or the change is none."""

    def plant(subject: Subject, config: dict[str, Any], draw: random.Random) -> Plant | None:
        if config.get(key) is None:
            return None
        value = change(config[key], draw)
        if value is None or value == config[key]:
            return None
        return Plant("config.json", f"{key}: {config[key]!r} became {value!r}", config={**config, key: value})

    return plant


def _without(block: dict[str, Any], key: str, factor: float) -> dict[str, Any] | None:
    return {**block, key: block[key] * factor} if key in block else None


CONFIG_FAULTS = {
    "rms_norm_eps": config_fault("rms_norm_eps", lambda eps, draw: eps * draw.choice([0.1, 10.0])),
    "rope_theta": config_fault("rope_theta", lambda theta, draw: 10000.0 if theta != 10000.0 else 1e6),
    "rope_scaling": config_fault("rope_scaling", lambda rope, draw: _without(rope, "factor", 2.0)),
    "rope mscale": config_fault("rope_scaling", lambda rope, draw: _without(rope, "mscale_all_dim", 0.5)),
    "routed_scaling_factor": config_fault("routed_scaling_factor", lambda value, draw: 1.0),
    "swiglu_limit": config_fault("swiglu_limit", lambda value, draw: value * 2),
    "n_group": config_fault("n_group", lambda value, draw: 1 if value > 1 else None),
    "topk_group": config_fault("topk_group", lambda value, draw: value - 1 if value > 1 else None),
    "norm_topk_prob": config_fault("norm_topk_prob", lambda value, draw: not value),
    "num_experts_per_tok": config_fault("num_experts_per_tok", lambda value, draw: value - 1),
}
