"""Coverage: what became of every tensor of the source, element by element.

Written from the definitions of the formats alone, and not from the code that exports them, so that an exporter's fault
is not repeated here. A float tensor must be the source's, rounded to the dtype that config.json announces. A quantised
one must lie within half a step of the source, with a scale that is the one its block calls for: a scale that is merely
wide enough would pass the first test and lose bits. One tensor is in memory at a time, and temporaries are some rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus.formats import get_format
from isthmus.formats.files.bundle import Bundle, architecture_of, read_config
from isthmus.formats.files.published import COMPUTED, CONFIG, StoredTensors
from isthmus.formats.parts.assemble import EMBEDDING, HEAD, ROUTER_BIAS, announced_dtype
from isthmus.formats.parts.names import mtp_copies
from isthmus.model.digest import tensor_sha256
from isthmus.parity.announced import Announced, odd_ones_out
from isthmus.parity.manifest import Entry, Fate, module_of
from isthmus.parity.steps import QUANTISED, Misfit, compare_quantised, within
from isthmus.recipe.architecture import ModelSection
from isthmus.records import Check, Outcome
from isthmus.run import Figure

NAME = "every source tensor is accounted for"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPANIONS = (
    "weight_scale",
    "weight_scale_inv",
    "weight_offset",
    "input_scale",
    "input_offset",
    "deq_scale",
    "quant_bias",
)
"""What stands beside a quantised `weight`: of compressed-tensors, of DeepSeek's fp8, and of ModelSlim."""
MERGED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Modules that engines make of several, with their rows one below the other."""
MOST_CHECKS = 32
_MOST_EXPLAINED, _MOST_SIBLINGS = 4, 512
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def _unchanged(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class _Fault:
    module: str
    detail: str


@dataclass
class _Found:
    fate: Fate
    stored: tuple[str, ...] = ()
    error: float | None = None
    detail: str = ""


def check_coverage(
    source: Mapping[str, Tensor],
    bundle: Bundle | Path,
    *,
    balance: Callable[[str, Tensor], Tensor] = _unchanged,
    compensated: Mapping[str, Tensor] | None = None,
    stochastic: bool = False,
) -> tuple[list[Entry], list[Check]]:
    """Follow every tensor of `source` (float, published names; may read them when asked) into a bundle.

    `balance` gives what a smoothing made of a source tensor before it was quantised. `compensated` holds the modules
    whose rounding makes up for the errors of others (GPTQ), each with the inputs [S, K] that it was meant for: it must
    not lose more of their outputs than rounding to the nearest. With `stochastic` a float may be either neighbour of
    the source's number in the announced dtype. All of it is said in the entries. Returns an entry per source tensor,
    and the checks: one that passes, or one per module at fault, in the order of the source.
    """
    with _opened(bundle) as (stored, announced, dtype, architecture):
        audit = _Audit(source, stored, announced, dtype, architecture, balance, compensated or {}, stochastic)
        entries = [audit.follow(name) for name in source]
        audit.look_for_strangers()
    return entries, _checks(entries, audit.faults)


@dataclass
class _Audit:
    source: Mapping[str, Tensor]
    stored: Mapping[str, Tensor]
    announced: Announced
    dtype: torch.dtype
    architecture: ModelSection
    balance: Callable[[str, Tensor], Tensor]
    compensated: Mapping[str, Tensor]
    stochastic: bool
    faults: list[_Fault] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)
    quantised: dict[str, bool] = field(default_factory=dict)

    def follow(self, name: str) -> Entry:
        """What became of one source tensor; notes a fault."""
        tensor = self.source[name]
        found = self._place(name, tensor)
        if isinstance(found, Misfit):
            self.faults.append(_Fault(module_of(name), f"{name}: {found.why}{self._explain(name, tensor)}"))
            found = _Found("unaccounted", detail=found.why)
        return Entry(
            source=name,
            sha256=tensor_sha256(tensor),
            fate=found.fate,
            stored=found.stored,
            error=found.error,
            detail=found.detail,
        )

    def look_for_strangers(self) -> None:
        """Stored tensors that no source tensor explains, copies that differ, and layers unlike the others."""
        copies = self._copies()
        for name in self.stored:
            if name in self.claimed:
                continue
            original = copies.get(name)
            if original is None or original not in self.source:
                self.faults.append(_Fault(module_of(name), f"{name} is stored and comes from no source tensor"))
                continue
            found = self._compare(name, self.source[original])
            if isinstance(found, Misfit):
                self.faults.append(_Fault(module_of(name), f"{name}, a copy of {original}: {found.why}"))
        if self.announced.any:
            self._compare_kinds()

    def _compare_kinds(self) -> None:
        """Where nothing says which modules are quantised, modules of a kind are all stored alike."""
        silent = {m: is_so for m, is_so in self.quantised.items() if self.announced.quantised(m) is None}
        for module, is_so in odd_ones_out(silent).items():
            how = "quantised, and most modules of its kind are not" if is_so else "left in float, unlike its kind"
            self.faults.append(_Fault(module, f"{module} is {how}"))

    def _place(self, name: str, tensor: Tensor) -> _Found | Misfit:
        if name in self.stored:
            return self._compare(name, self.balance(name, tensor), tensor)
        if name.endswith(COMPUTED):
            return _Found("dropped", detail="computed from config.json")
        if name.endswith(".bias") and (into := f"{module_of(name)}.quant_bias") in self.stored:
            return _Found("merged", (into,), detail="added to the correction for the input's offset")
        if (merged := self._merged(name)) is not None:
            return self._compare_merged(merged, name)
        original = self._copies().get(name)
        if original is not None:
            if original in self.source and _same(tensor, self.source[original]):
                return _Found("dropped", detail=f"a copy of {original}")
            return Misfit(f"is not stored, though it is no copy of {original}")
        a = self.architecture
        if not a.num_nextn_predict_layers and name.startswith(f"model.layers.{a.num_hidden_layers}."):
            return _Found("dropped", detail="of the MTP layer, and num_nextn_predict_layers = 0")
        return Misfit("is not stored, and nothing says why")

    def _copies(self) -> dict[str, str]:
        tied = {HEAD: EMBEDDING} if self.architecture.tie_word_embeddings else {}
        return {**mtp_copies(self.architecture), **tied}

    def _compare(self, name: str, tensor: Tensor, before: Tensor | None = None) -> _Found | Misfit:
        """A source tensor against the stored one of this name and what stands beside it; `before` it was balanced."""
        stored, module = self.stored[name], module_of(name)
        self.claimed.add(name)
        beside = self._beside(name)
        if stored.shape != tensor.shape:
            return Misfit(f"is {list(stored.shape)}, in the source {list(tensor.shape)}")
        is_linear = name.endswith(".weight") and stored.dim() == 2
        if is_linear:
            self.quantised[module] = stored.dtype in QUANTISED
        said = self.announced.quantised(module) if is_linear else False
        if stored.dtype in FLOATS:
            if said:
                return Misfit(f"is left in {_short(stored.dtype)}, and the format announces it as quantised")
            if beside:
                return Misfit(f"is in {_short(stored.dtype)}, and {next(iter(beside))} stands beside it")
            return self._compare_float(name, tensor, stored)
        if stored.dtype not in QUANTISED:
            return Misfit(f"is stored in {_short(stored.dtype)}, which no format here has for a weight")
        if said is False:
            return Misfit(f"is quantised to {_short(stored.dtype)}, and nothing announces it")
        found = self._compare_quantised(name, tensor, stored, beside)
        if isinstance(found, Misfit) or before is None or before is tensor or _same(tensor, before):
            return found
        notes = [*([found.detail] if found.detail else []), "balanced before quantising"]
        return replace(found, detail="; ".join(notes))

    def _beside(self, name: str) -> dict[str, Tensor]:
        if not name.endswith(".weight"):
            return {}
        names = {part: f"{module_of(name)}.{part}" for part in COMPANIONS}
        there = {part: full for part, full in names.items() if full in self.stored}
        self.claimed.update(there.values())
        return {part: self.stored[full] for part, full in there.items()}

    def _compare_float(self, name: str, tensor: Tensor, stored: Tensor) -> _Found | Misfit:
        if _same(stored, tensor):
            return _Found("carried", (name,))
        if name.endswith(ROUTER_BIAS):
            return Misfit(f"differs from the source, which it must carry without loss{_difference(stored, tensor)}")
        if stored.dtype != self.dtype:
            return Misfit(
                f"is in {_short(stored.dtype)}, where {_short(self.dtype)} is announced, and differs from the source"
            )
        if _same(stored, tensor.to(stored.dtype)):
            return _Found("carried", (name,), detail=f"rounded to {_short(stored.dtype)}")
        if self.stochastic and _neighbours(stored, tensor):
            return _Found("carried", (name,), detail=f"rounded at random to {_short(stored.dtype)}")
        return Misfit(f"is not the source in {_short(stored.dtype)}{_difference(stored, tensor.to(stored.dtype))}")

    def _compare_quantised(
        self, name: str, tensor: Tensor, stored: Tensor, beside: dict[str, Tensor]
    ) -> _Found | Misfit:
        module = module_of(name)
        inputs = self.compensated.get(module)
        bias = self.source.get(f"{module}.bias") if "quant_bias" in beside else None
        worst = compare_quantised(tensor, stored, beside, self.announced, bias=bias, inputs=inputs)
        if isinstance(worst, Misfit):
            return worst
        note = f"rounded by GPTQ, with {worst:.2f} of the output error of the nearest" if inputs is not None else ""
        names = (name, *(f"{module}.{part}" for part in beside))
        return _Found("quantised", names, worst, note)

    def _merged(self, name: str) -> str | None:
        """The stored tensor that holds this one among others, by name."""
        prefix, _, rest = module_of(name).rpartition(".")
        for whole, parts in MERGED.items():
            if rest in parts and (full := f"{prefix}.{whole}.{name.rpartition('.')[2]}") in self.stored:
                return full
        return None

    def _compare_merged(self, whole: str, name: str) -> _Found | Misfit:
        prefix, _, module = module_of(whole).rpartition(".")
        last = whole.rpartition(".")[2]
        parts = [f"{prefix}.{part}.{last}" for part in MERGED[module]]
        if missing := [part for part in parts if part not in self.source]:
            return Misfit(f"is merged into {whole} with {missing[0]}, which the source does not have")
        if name != parts[0] and whole in self.claimed:
            return _Found("merged", (whole,), detail=f"compared with {parts[0]}")
        found = self._compare(whole, torch.cat([self.balance(part, self.source[part]) for part in parts]))
        return found if isinstance(found, Misfit) else _Found("merged", found.stored, found.error, found.detail)

    def _explain(self, name: str, tensor: Tensor) -> str:
        """Where the values come from that are there instead, if that is plain to see."""
        if name not in self.stored or len(self.faults) >= _MOST_EXPLAINED:
            return ""
        if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] and self._fits(name, tensor.t().contiguous()):
            return "; it is the source's matrix transposed"
        expert = _EXPERT.search(name)
        if expert is None:
            return ""
        for number in range(_MOST_SIBLINGS):
            other = f"{name[: expert.start(1)]}{number}{name[expert.end(1) :]}"
            if other not in self.source:
                return ""
            if other != name and self._fits(name, self.source[other]):
                return f"; it holds the weights of expert {number}"
        return ""

    def _fits(self, name: str, tensor: Tensor) -> bool:
        return isinstance(self._compare(name, self.balance(name, tensor)), _Found)


class _Lazy(Mapping[str, Tensor]):
    """Stored tensors that are read when they are asked for."""

    def __init__(self, stored: StoredTensors):
        self._stored, self._names = stored, stored.names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._stored:
            raise KeyError(name)
        return self._stored.read(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_Opened = tuple[Mapping[str, Tensor], Announced, torch.dtype, ModelSection]


class _OpenedFolder(AbstractContextManager[_Opened]):
    def __init__(self, folder: Path):
        self.folder, self.tensors = folder, StoredTensors(folder)

    def __enter__(self) -> _Opened:
        config = read_config(self.folder)
        return (
            _Lazy(self.tensors),
            Announced(config),
            _dtype(announced_dtype(config)),
            architecture_of(self.folder, config),
        )

    def __exit__(self, *_: object) -> None:
        self.tensors.__exit__(None, None, None)


def _opened(bundle: Bundle | Path) -> AbstractContextManager[_Opened]:
    if isinstance(bundle, Path):
        return _OpenedFolder(bundle)
    if (bundle.folder / CONFIG).is_file():
        announced = Announced(read_config(bundle.folder))
    else:
        announced = Announced(
            {"quantization_config": get_format(bundle.format).quantization_config(bundle.architecture)}
        )
    dtype = _dtype(get_format(bundle.format).dtype)
    return nullcontext((bundle.tensors, announced, dtype, bundle.architecture))


def _checks(entries: list[Entry], faults: list[_Fault]) -> list[Check]:
    if faults:
        checks = [_check("fail", fault.detail, fault.module) for fault in faults[:MOST_CHECKS]]
        if len(faults) > MOST_CHECKS:
            checks.append(_check("fail", f"and {len(faults) - MOST_CHECKS} more tensors", None))
        return checks
    fates = Counter(entry.fate for entry in entries)
    counts = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))
    errors = [entry.error for entry in entries if entry.error is not None]
    figure = None
    if errors:
        source = (
            f"largest error over {len(errors)} quantised tensors, as a share of what rounding to the nearest may cost"
        )
        figure = Figure.measured(max(errors), "of what rounding may cost", source, rehearsed=False)
    return [_check("pass" if entries else "unknown", f"{len(entries)} source tensors: {counts}", None, figure)]


def _check(outcome: Outcome, detail: str, module: str | None, figure: Figure | None = None) -> Check:
    return Check(layer="coverage", name=NAME, outcome=outcome, figure=figure, detail=detail, module=module)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two float tensors hold the same finite numbers, whatever their dtypes; rows at a time."""
    if one.shape != other.shape:
        return False
    wide = torch.promote_types(one.dtype, other.dtype)
    return all(torch.equal(a.to(wide), b.to(wide)) for a, b in within(one, other))


def _neighbours(stored: Tensor, source: Tensor) -> bool:
    """Whether each stored number is one of the two of its dtype between which the source's lies; rows at a time."""
    return stored.dtype == torch.bfloat16 and all(_each_is_near(a, b.float()) for a, b in within(stored, source))


def _each_is_near(stored: Tensor, source: Tensor) -> bool:
    nearest = source.to(stored.dtype)
    away = torch.where(source > nearest, torch.inf, -torch.inf).to(stored.dtype)
    other = torch.where(nearest.float() == source, nearest, torch.nextafter(nearest, away))
    return bool(((stored == nearest) | (stored == other)).all())


def _difference(stored: Tensor, wanted: Tensor) -> str:
    wrong = sum(int((a.double() != b.double()).sum()) for a, b in within(stored, wanted))
    return f": {wrong:,} of {stored.numel():,} elements differ"


def _dtype(name: str | None) -> torch.dtype:
    found = getattr(torch, name or "float32", torch.float32)
    return found if found in FLOATS else torch.float32


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
