"""Lint: the numbers around the weights, where they are written and where they arrived.

`lint_config` holds config.json against the architecture of the manifest, against the tensors that are stored, and
against what is known of the target chip; of the tensors it reads scales, offsets and routing biases. `lint_model` reads
the hyper-parameters back from a model as it was built.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus.chips import get_chip, rules_for
from isthmus.errors import IsthmusError
from isthmus.formats import recognise_format
from isthmus.formats.files.bundle import architecture_of, read_config
from isthmus.formats.files.published import StoredTensors
from isthmus.formats.parts.assemble import EMBEDDING, HEAD, ROUTER_BIAS, announced_dtype
from isthmus.formats.parts.values import value_problems
from isthmus.model.attention import LatentAttention, RotaryTable
from isthmus.model.config import hf_config, rope_amplitude, rope_inverse_frequencies, softmax_scale
from isthmus.model.dense import GroupedQueryAttention
from isthmus.model.model import Model
from isthmus.model.moe import Router
from isthmus.parity.announced import FLOATS, Announced, odd_ones_out
from isthmus.parity.manifest import MANIFEST, architecture_fields, module_of, read_manifest
from isthmus.recipe.architecture import (
    DeepseekSection,
    GroupedSection,
    MixtureSection,
    ModelSection,
    architecture_from_config,
    parse_architecture,
)
from isthmus.records import Check, CheckOutcome

CONFIGURED = "config.json says what the source's does"
STORED = "config.json fits the stored tensors"
BUILT = "the model was built with the source's hyper-parameters"
TARGET = "the target is known to run it"
_QUANTISED_KINDS = {"I8": "int8", "F8_E4M3": "fp8", "F8_E5M2": "fp8", "U8": "packed", "I32": "packed"}
_FLOAT_KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_SCALES = ("weight_scale", "weight_scale_inv", "deq_scale")
_DTYPE_OF = {"fp32": "fp32", "bf16": "bf16", "fp8": "fp8", "mxfp8": "fp8"}
_OTHERS_MAY_DIFFER = frozenset({"bos_token_id", "eos_token_id", "torch_dtype", "initializer_range", "ep_size"})
"""Keys that say nothing of what the model computes from tokens, or that are held against something else."""
TABLE_SLACK = 4.0
"""Units in the last place of the table's dtype by which cos and sin may be off: they are computed in float64."""


def lint_config(bundle_folder: Path, architecture: ModelSection | None = None, chip: str | None = None) -> list[Check]:
    """Checks of layer "config" of a bundle. `architecture` is the source's, the manifest's if absent; `chip` a slug.

    A difference from the source is `fail`, and `unknown` where there is no source to compare with. What the chip cannot
    run is `fail`, what is a risk there `caution`, as is a number that is left to the defaults of other readers.
    Raises IsthmusError if this is no bundle, or the chip is not known.
    """
    config = read_config(bundle_folder)
    expected = architecture or _of_manifest(bundle_folder)
    try:
        found = architecture_of(bundle_folder, config)
    except IsthmusError as error:
        return [_check(CONFIGURED, "fail", str(error))]
    checks = _configured(config, found, expected)
    announced = Announced(config)
    with StoredTensors(bundle_folder) as stored:
        problems, names = [*_stored(config, found, announced, stored)], stored.names
        problems += [(module_of(name), f"{name} {words}") for name, words in value_problems(names, stored.read)]
    checks += _listed(STORED, problems, "dtypes, shapes and what is quantised are as announced")
    if chip is not None:
        checks += _target(config, found, names, chip)
    return checks


def lint_model(model: nn.Module, architecture: ModelSection) -> list[Check]:
    """Checks of a model as it was built, anywhere and in any dtype: one that passes, or one per module that differs."""
    problems = [
        (path, f"{path}: {name} is {found!r}, the source has {expected!r}")
        for path, name, found, expected in _hyperparameters(model, architecture)
        if found != expected
    ]
    problems += _tables(model, architecture)
    return _listed(BUILT, problems, "norms, attention, rotary tables, routers and clamps are the source's")


def _of_manifest(bundle_folder: Path) -> ModelSection | None:
    if not (bundle_folder / MANIFEST).is_file():
        return None
    return parse_architecture(read_manifest(bundle_folder).architecture)


def _configured(config: dict[str, Any], found: ModelSection, expected: ModelSection | None) -> list[Check]:
    if expected is None:
        return [_check(CONFIGURED, "unknown", f"there is no {MANIFEST} and no source to compare with")]
    written = hf_config(expected, dtype="", bos_token_id=None, eos_token_id=0)
    wanted = architecture_fields(parse_architecture(architecture_from_config(written)))
    given = architecture_fields(found)
    problems = {key: (given.get(key), value) for key, value in wanted.items() if given.get(key) != value}
    for key, value in written.items():
        if key not in _OTHERS_MAY_DIFFER and key in config and config[key] != value and not _same_rope(key, config):
            problems.setdefault(key, (config[key], value))
    if problems:
        return [
            _check(CONFIGURED, "fail", f"{key} is {given!r} in config.json, and {wanted!r} in the source")
            for key, (given, wanted) in problems.items()
        ]
    absent = sorted(
        key
        for key, value in wanted.items()
        if value is not None and key in written and key not in config
        if key not in _OTHERS_MAY_DIFFER and not key.startswith("rope_")
    )
    if absent:
        what = f"config.json leaves {', '.join(absent)} to the defaults of whoever reads it"
        return [_check(CONFIGURED, "caution", what)]
    return [_check(CONFIGURED, "pass", f"{len(written)} keys, rope and routing among them")]


def _same_rope(key: str, config: dict[str, Any]) -> bool:
    """Whether rope stands under its other key only; its numbers are compared as part of the architecture."""
    return key in ("rope_scaling", "rope_parameters") and not config[key]


Problem = tuple[str | None, str]


def _stored(
    config: dict[str, Any], found: ModelSection, announced: Announced, stored: StoredTensors
) -> Iterator[Problem]:
    yield from _quantisation(announced, stored)
    yield from _dtypes(config, stored)
    yield from _shapes(found, stored)


def _quantisation(announced: Announced, stored: StoredTensors) -> Iterator[Problem]:
    quantised = {}
    for name in stored.names:
        if name.endswith(".weight") and len(stored.shape(name)) == 2:
            quantised[module_of(name)] = stored.kind(name) in _QUANTISED_KINDS
    if announced.any and not any(quantised.values()) and any(announced.quantised(m) is not False for m in quantised):
        what = "ModelSlim's description" if announced.by_description else "quantization_config"
        why = "engines then look for scales that are not there (KeyError: weight_scale_inv)"
        yield None, f"{what} stands beside float weights: {why}; remove it"
        return
    if not announced.any and any(quantised.values()):
        first = next(module for module, is_so in quantised.items() if is_so)
        yield first, f"{first} is quantised, and config.json has no quantization_config"
        return
    silent = {}
    for module, is_so in quantised.items():
        said = announced.quantised(module)
        if said is None:
            silent[module] = is_so
        elif said != is_so:
            how = "in float, and config.json says it is quantised" if said else "quantised, and config.json says float"
            yield module, f"{module} is stored {how}"
        if is_so and not any(f"{module}.{part}" in stored for part in _SCALES):
            yield module, f"{module} is quantised, and no scale stands beside it"
    for module, is_so in odd_ones_out(silent).items():
        how = "quantised, and most of its kind are not" if is_so else "left in float, unlike its kind"
        yield module, f"{module} is {how}"


def _dtypes(config: dict[str, Any], stored: StoredTensors) -> Iterator[Problem]:
    announced = announced_dtype(config)
    wanted = _FLOAT_KINDS.get(announced or "")
    if wanted is None:
        yield None, f"torch_dtype is {announced!r}; weights here are {', '.join(_FLOAT_KINDS)}"
        return
    for name in stored.names:
        kind = stored.kind(name)
        if kind in FLOATS and kind != wanted and name.endswith((".weight", ".bias")) and not name.endswith(ROUTER_BIAS):
            yield module_of(name), f"{name} is stored in {kind}, and config.json announces {announced}"


def _shapes(found: ModelSection, stored: StoredTensors) -> Iterator[Problem]:
    shapes = {EMBEDDING: (found.vocab_size, found.hidden_size), HEAD: (found.vocab_size, found.hidden_size)}
    for name, shape in shapes.items():
        if name in stored and stored.shape(name) != shape:
            yield module_of(name), f"{name} is {list(stored.shape(name))}, and config.json says {list(shape)}"
    if HEAD not in stored and not found.tie_word_embeddings:
        yield module_of(HEAD), f"{HEAD} is missing, and tie_word_embeddings is false"
    depth = found.num_hidden_layers + found.num_nextn_predict_layers
    numbers = {name.split(".")[2] for name in stored.names if name.startswith("model.layers.")}
    there = {int(number) for number in numbers if number.isdigit()}
    if missing := sorted(set(range(depth)) - there):
        where = f"model.layers.{missing[0]}"
        yield where, f"{where} is missing; config.json says {depth} layers with the MTP layer"
    if added := sorted(there - set(range(depth))):
        where = f"model.layers.{added[0]}"
        yield where, f"{where} is stored; config.json says {depth} layers with the MTP layer"


def _target(config: dict[str, Any], found: ModelSection, tensors: Collection[str], slug: str) -> list[Check]:
    chip, name = get_chip(slug), recognise_format(config).name
    values = {**architecture_fields(found), "format": name}
    checks = [
        _check(
            TARGET,
            rule.breach,
            f"{rule.key} = {values.get(rule.key)!r} on {slug}: {rule.why} ({rule.standing}: {rule.source})",
        )
        for rule in rules_for(slug, tensors)
        if rule.key in values and not rule.holds(values[rule.key])
    ]
    dtypes, dtype = chip.capabilities.dtypes, _DTYPE_OF.get(name, "int8")
    if dtypes is not None and dtype not in dtypes and not any(check.outcome == "fail" for check in checks):
        checks.append(_check(TARGET, "caution", f"{name} on {slug}: no rate in {dtype} is published for it"))
    return checks or [_check(TARGET, "pass", f"no rule for {slug} speaks against it")]


def _hyperparameters(model: nn.Module, a: ModelSection) -> Iterator[tuple[str, str, object, object]]:
    """Path, name, found and expected value of every hyper-parameter that a model keeps."""
    limit = a.swiglu_limit if isinstance(a, DeepseekSection) else None
    for path, module in model.named_modules():
        if isinstance(module, Router) and isinstance(a, MixtureSection):
            yield from _of_router(path, module, a)
        elif isinstance(module, LatentAttention) and isinstance(a, DeepseekSection):
            found = (module.num_heads, module.nope, module.rope, module.v_dim, module.rank)
            sizes = (a.num_attention_heads, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim, a.kv_lora_rank)
            yield path, "heads and their sizes", found, sizes
            yield path, "the scale of scores", module.scale, softmax_scale(a)
        elif isinstance(module, GroupedQueryAttention) and isinstance(a, GroupedSection):
            found = (module.num_heads, module.num_kv_heads, module.head_size)
            yield path, "heads and their size", found, (a.num_attention_heads, a.num_key_value_heads, a.head_size)
            yield path, "the scale of scores", module.scale, a.head_size**-0.5
            yield path, "the sliding window", module.layout.window, a.window_of(int(path.split(".")[2]))
        elif hasattr(module, "eps"):
            yield path, "eps", module.eps, a.rms_norm_eps
        elif hasattr(module, "limit"):
            yield path, "the clamp in front of SwiGLU", module.limit, limit
    if isinstance(model, Model):
        depth = a.num_hidden_layers + a.num_nextn_predict_layers
        yield "model.layers", "the number of layers", len(model.model.layers), depth


def _of_router(path: str, router: Router, a: MixtureSection) -> Iterator[tuple[str, str, object, object]]:
    yield path, "experts per token", router.top_k, a.num_experts_per_tok
    yield path, "groups", (router.n_group, router.topk_group), (a.n_group, a.topk_group)
    yield path, "the routed scaling factor", router.scaling, a.routed_scaling_factor
    yield path, "norm_topk_prob", router.normalise, a.norm_topk_prob
    yield path, "softmax scores", router.softmax, a.scoring_func == "softmax"


def _tables(model: nn.Module, a: ModelSection) -> list[Problem]:
    """The rotary tables against their definition, by value."""
    problems: list[Problem] = []
    frequencies = torch.tensor(rope_inverse_frequencies(a), dtype=torch.float64)
    for path, module in model.named_modules():
        if not isinstance(module, RotaryTable):
            continue
        angles = torch.arange(a.max_position_embeddings, dtype=torch.float64)[:, None] * frequencies
        for name, table, exact in (("cos", module.cos, angles.cos()), ("sin", module.sin, angles.sin())):
            wanted = exact * rope_amplitude(a)
            if table.shape != wanted.shape:
                problems.append((path, f"{path}: {name} is {list(table.shape)} and should be {list(wanted.shape)}"))
                continue
            slack = TABLE_SLACK * torch.finfo(table.dtype).eps * max(1.0, rope_amplitude(a))
            off = (table.detach().cpu().double() - wanted).abs() > slack
            if bool(off.any()):
                position = int(off.any(1).nonzero()[0])
                problems.append((path, f"{path}: {name} differs from position {position} on: base, scaling or layout"))
    return problems


def _listed(name: str, problems: list[Problem], well: str) -> list[Check]:
    if not problems:
        return [_check(name, "pass", well)]
    return [_check(name, "fail", detail, module) for module, detail in problems]


def _check(name: str, outcome: CheckOutcome, detail: str, module: str | None = None) -> Check:
    return Check(layer="config", name=name, outcome=outcome, detail=detail, module=module)
