"""The operator calls that a recipe's work makes, as specifications from which anyone can make the same call again.

A specification is JSON: `operator` (a name as in `aten::add.Tensor`), `arguments`, `named`, `count` (how often the work
made calls of its kind) and `uses` (what the operator is needed for). A tensor is `{"tensor": {"shape", "strides",
"dtype", "values"}}`: values are not kept, but described well enough that drawn ones make a valid call (indices stay in
bounds, sorted numbers sorted, probabilities add up). The dtype "float" stands for the dtype under test.
`isthmus.probes.portable.operators` makes the calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isthmus.chips.rehearse.dispatch import OperatorWatch, short_name
from isthmus.data.corpus import Document
from isthmus.engines.local.core.runner import Trial
from isthmus.model.model import Model
from isthmus.recipe.architecture import GroupedSection, ModelSection, Qwen3MoeSection
from isthmus.recipe.practice import generating, taught
from isthmus.recipe.schema import Recipe
from isthmus.trainer.batch import pack
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.step import target_logprobs, train_step

Call = dict[str, Any]
MOST_NUMBERS = 1 << 12
"""Numbers in all tensors of a call that is preferred: larger ones are kept only where no smaller one is alike."""
LONGEST_LIST = 4
KINDS, KINDS_OF_VIEWS = 8, 3
"""Kinds of calls of one operator that are kept, those that the work makes most often."""
FARTHEST = 1 << 31
"""Whole numbers are drawn within this: what memory holds before it is written may be any."""
GAPS = 8
"""A strided tensor keeps its strides unless they span more than so many times what it holds."""
DOCUMENT_LENGTHS = (5, 9, 14, 23, 40)
PROMPT = 3
DECODED = 2


def recipe_calls(recipe: Recipe) -> list[Call]:
    """Calls of one training step, one learning step of RL and a generation, of the recipe's architecture made small.

    One of each kind, and the largest beside the smallest where they differ. Runs on the CPU in fp32, within a second.
    """
    section = small_model(recipe.model)
    model = Model(section).initialise(recipe.seed)
    text = taught(recipe)
    optimizer = Optimizer(model, text.optimizer, text.steps)
    documents = _documents(section.vocab_size)
    batch = pack(documents)

    recorder = CallRecorder()
    with recorder:
        recorder.use = "training"
        train_step(model, optimizer, batch, text, 0)
        optimizer.zero_grad()
        target_logprobs(model, batch, generating(recipe).temperature)[0].mean().backward()
        recorder.use = "serving"
        with torch.inference_mode():
            _generate(model, [document.tokens for document in documents[:3]])
    return recorder.calls()


def small_model(section: ModelSection) -> ModelSection:
    """The same architecture, at most two layers deep and narrow enough for a probe."""
    changes: dict[str, Any] = {
        "vocab_size": min(section.vocab_size, 512),
        "hidden_size": min(section.hidden_size, 256),
        "intermediate_size": min(section.intermediate_size, 512),
        "num_hidden_layers": min(section.num_hidden_layers, 2),
        "num_attention_heads": min(section.num_attention_heads, 4),
        "max_position_embeddings": min(section.max_position_embeddings, 256),
    }
    if isinstance(section, GroupedSection):
        return section.model_copy(update=changes | _small_heads(section, changes["num_hidden_layers"]))
    per_group = max(2, -(-section.num_experts_per_tok // section.topk_group), 8 // section.n_group)  # pyright: ignore
    most = {
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": per_group * section.n_group,  # pyright: ignore[reportAttributeAccessIssue]
        "first_k_dense_replace": 1,
    }
    now = {name: getattr(section, name) for name in most}
    changes |= {name: min(now[name], limit) for name, limit in most.items() if now[name] is not None}
    return section.model_copy(update=changes)


def _small_heads(section: GroupedSection, depth: int) -> dict[str, Any]:
    """Of the layers those that are kept: the last ones, which have the windows and the experts."""
    changes: dict[str, Any] = {
        "num_key_value_heads": 2 if section.num_key_value_heads > 1 else 1,
        "head_dim": min(section.head_size, 64),
        "sliding_window": section.sliding_window and min(section.sliding_window, 8),
        "layer_types": section.layer_types and section.layer_types[-depth:],
    }
    if isinstance(section, Qwen3MoeSection):
        experts = max(8, section.num_experts_per_tok)
        mixed = depth > 1 and len(section.sparse_layers) < section.num_hidden_layers
        changes |= {"moe_intermediate_size": min(section.moe_intermediate_size, 128), "num_experts": experts}
        changes |= {"mlp_only_layers": [0] if mixed else [], "decoder_sparse_step": 1}
    return changes


def _documents(vocabulary: int) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in DOCUMENT_LENGTHS]
    return [Document(tokens, PROMPT) for tokens in drawn]


def _generate(model: Model, prompts: list[list[int]]) -> None:
    trial = Trial(model, len(prompts), max(map(len, prompts)) + DECODED)
    logits = trial.prefill(prompts)
    for _ in range(DECODED):
        logits = trial.decode(logits.argmax(-1))


class CallRecorder(OperatorWatch):
    """Within this context, specifies the operators that are called; draws are left out.

    It keeps the smallest and the largest call of each kind. A kind is an operator, the form of its tensors and its
    numbers that are not sizes. `use` says what the work is for, "training" or "serving".
    """

    def __init__(self) -> None:
        super().__init__()
        self.use = "training"
        self._kinds: dict[str, list[Call]] = {}
        self._views: set[str] = set()
        self._uses: dict[str, set[str]] = {}
        self._given: tuple[Any, tuple[Any, ...], dict[str, Any]] = None, (), {}

    def calls(self) -> list[Call]:
        """What was recorded, by the names of the operators; of each, the kinds of calls that were made most often."""
        chosen: list[Call] = []
        for operator in sorted(self._uses):
            kinds = [alike for alike in self._kinds.values() if alike[0]["operator"] == operator]
            most = KINDS_OF_VIEWS if operator in self._views else KINDS
            for alike in sorted(kinds, key=lambda alike: -alike[0]["count"])[:most]:
                chosen += [{**call, "uses": sorted(self._uses[operator])} for call in _chosen(alike)]
        return chosen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._given = func, args, kwargs or {}
        return super().__torch_dispatch__(func, types, args, kwargs)

    def see(self, operator: str, dtypes: set[torch.dtype]) -> None:
        func, args, kwargs = self._given
        if torch.Tag.nondeterministic_seeded in func.tags:
            return
        self._uses.setdefault(operator, set()).add(self.use)
        if func.is_view:
            self._views.add(operator)
        call = specify(operator, args, kwargs)
        alike = self._kinds.setdefault(operator + _form(call), [])
        if alike:
            alike[0]["count"] += 1
            call["count"] = alike[0]["count"]
        if len(alike) < 2:
            alike.append(call)
        elif _fits(call) and numbers_of(call) > numbers_of(alike[1]):
            alike[1] = call
        elif not _fits(alike[0]) or numbers_of(call) < numbers_of(alike[0]):
            alike[0] = call


def edge_calls(grouped: bool) -> list[Call]:
    """Shapes at the edge that the work may meet on another day: nothing to add up, no rows, no dimensions.

    With `grouped` also products of groups of uneven sizes, some of them empty, as experts have them.
    """
    rows, none = _floats_of(4, 8), _floats_of(0, 8)
    nowhere = _exactly([], "int64")
    calls = [
        _edge("aten::mm", _floats_of(3, 0), _floats_of(0, 5)),
        _edge("aten::mm", none, _floats_of(8, 5)),
        _edge("aten::bmm", _floats_of(0, 2, 3), _floats_of(0, 3, 4)),
        _edge("aten::sum", none),
        _edge("aten::sum.dim_IntList", none, [0]),
        _edge("aten::cat", [none, rows, none]),
        _edge("aten::index_select", rows, 0, nowhere),
        _edge("aten::index_add", rows, 0, nowhere, none),
        _edge("aten::embedding", rows, nowhere),
        _edge("aten::sort.stable", none, stable=True, dim=0),
        _edge("aten::topk", _floats_of(1), 1),
        _edge("aten::cumsum", none, 0),
        _edge("aten::nonzero", _exactly([0, 0, 0], "int64")),
        _edge("aten::_softmax", _floats_of(), -1, False),
        _edge("aten::_log_softmax", none, -1, False),
        _edge("aten::add.Tensor", _floats_of(), _floats_of(1)),
        _edge("aten::mul.Tensor", rows, _floats_of()),
        _edge("aten::mean", _floats_of()),
        _edge("aten::silu", none),
    ]
    attention = [_floats_of(2, 3, 7, 16) for _ in range(3)]
    calls.append(_edge("aten::scaled_dot_product_attention", *attention, None, 0.0, True))
    if grouped:
        for ends in ([5, 5, 17, 24], [0, 24, 24, 24]):
            call = _edge("aten::_grouped_mm", _floats_of(24, 16), _floats_of(4, 16, 8), offs=_exactly(ends, "int32"))
            calls.append({**call, "dtypes": ["bfloat16"]})
    return calls


def _edge(operator: str, *arguments: Any, **named: Any) -> Call:
    return {
        "operator": operator,
        "arguments": list(arguments),
        "named": named,
        "count": 0,
        "uses": ["serving", "training"],
    }


def _floats_of(*shape: int) -> dict[str, Any]:
    return {"tensor": {"shape": list(shape), "dtype": "float", "values": {"kind": "normal"}}}


def _exactly(numbers: list[int], dtype: str) -> dict[str, Any]:
    return {"tensor": {"shape": [len(numbers)], "dtype": dtype, "values": {"kind": "given", "numbers": numbers}}}


def _chosen(alike: list[Call]) -> list[Call]:
    """The smallest and the largest of a kind, or one where they are the same or the larger one is too large."""
    small, large = min(alike, key=numbers_of), max(alike, key=numbers_of)
    same = small["arguments"] == large["arguments"] and small["named"] == large["named"]
    kept = [small] if same or not _fits(large) else [small, large]
    return [{**call, "count": alike[0]["count"]} for call in kept]


def specify(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The specification of a call with these arguments."""
    floating = any(tensor.is_floating_point() for tensor in _tensors([*args, *kwargs.values()]))
    named = {name: _argument(value, floating) for name, value in kwargs.items() if name != "pin_memory"}
    arguments = [_argument(value, floating) for value in args]
    if operator.startswith("aten::_fused_"):
        for spec in _specs(arguments):
            if spec["dtype"] == "float" and not spec["shape"]:
                spec["dtype"] = "float32"  # Steps and rates of a fused optimiser are fp32 whatever the parameters are.
    return {"operator": operator, "arguments": arguments, "named": named, "count": 1}


def numbers_of(call: Call) -> int:
    """Numbers in all tensors of a call."""
    return sum(_product(spec["shape"]) for spec in _specs([*call["arguments"], *call["named"].values()]))


def _fits(call: Call) -> bool:
    return numbers_of(call) <= MOST_NUMBERS


def _argument(value: Any, floating: bool) -> Any:
    """One argument in JSON."""
    if isinstance(value, Tensor):
        return {"tensor": describe_tensor(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": "float" if floating and value == torch.float32 else short_name(value)}
    if isinstance(value, torch.device):
        return {"device": "here"}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        cut = value[:LONGEST_LIST] if value and isinstance(value[0], Tensor) else value
        return [_argument(one, floating) for one in cut]
    if isinstance(value, float) and value - value != 0.0:
        return {"number": str(value)}
    assert value is None or isinstance(value, bool | int | float | str), f"an argument of type {type(value)}"
    return value


def describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """Shape, strides in elements where they are not those of a contiguous tensor, dtype, and what its values are."""
    plain = tensor.detach()
    spec: dict[str, Any] = {"shape": list(plain.shape), "dtype": _dtype(plain.dtype), "values": _values(plain)}
    if not plain.is_contiguous():
        spec["strides"] = _compact(list(plain.shape), list(plain.stride()))
    return spec


def _dtype(dtype: torch.dtype) -> str:
    return "float" if dtype.is_floating_point else short_name(dtype)


def _compact(shape: list[int], strides: list[int]) -> list[int]:
    """The strides, or those of a tensor without gaps in the same order where the gaps are wide."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if span <= GAPS * max(1, _product(shape)):
        return strides
    dense, step = list(strides), 1
    for axis in sorted(range(len(shape)), key=lambda axis: (strides[axis], axis)):
        if strides[axis]:
            dense[axis], step = step, step * shape[axis]
    return dense


def _values(tensor: Tensor) -> dict[str, Any]:
    if tensor.numel() == 0:
        return {"kind": "normal" if tensor.is_floating_point() else "integers", "low": 0, "high": 0}
    if tensor.dtype == torch.bool:
        return {"kind": "marks", "count": int(tensor.sum())}
    if tensor.is_floating_point():
        return _floats(tensor.double())
    return _integers(tensor)


def _floats(tensor: Tensor) -> dict[str, Any]:
    finite = tensor[tensor.isfinite()]
    if finite.numel() < tensor.numel():
        share = 1.0 - finite.numel() / tensor.numel()
        return {"kind": "masked", "share": round(share, 3), "zeros": not bool(finite.any())}
    low, high = finite.min().item(), finite.max().item()
    if low == high == 0.0 or tensor.dim() == 0:
        return {"kind": "constant", "value": low}
    if bool(((finite == 0) | (finite == 1)).all()) and low < high:
        return {"kind": "marks", "count": int(finite.sum())}
    if low >= 0.0:
        spread = tensor.shape[-1] > 1 and bool(((tensor.sum(-1) - 1.0).abs() < 1e-3).all())
        return {"kind": "probabilities"} if spread else {"kind": "positive", "high": min(max(high, 0.01), 100.0)}
    if high <= 0.0 and bool((tensor.logsumexp(-1).abs() < 1e-3).all()):
        return {"kind": "log-probabilities"}
    return {"kind": "normal"}


def _integers(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.flatten()
    low, high = max(int(flat.min()), -FARTHEST), min(int(flat.max()), FARTHEST)
    values: dict[str, Any] = {"kind": "integers", "low": low, "high": high}
    if not low <= high:
        return {**values, "low": 0, "high": 0}
    if len(flat) > 1 and len(flat.unique()) == len(flat):
        values["distinct"] = True
    if len(flat) > 1 and bool((flat.diff() >= 0).all()):
        values["sorted"] = True
    return values


def _form(call: Call) -> str:
    """What makes calls of one operator differ in kind: everything but sizes, and numbers that follow from the data."""
    return json.dumps([_form_of(value) for value in [*call["arguments"], *call["named"].items()]])


def _form_of(value: Any) -> Any:
    if isinstance(value, list | tuple):
        forms = [_form_of(one) for one in value]
        return [json.loads(text) for text in sorted({json.dumps(form) for form in forms})]
    if isinstance(value, dict) and "tensor" in value:
        spec = value["tensor"]
        ones = [size == 1 for size in spec["shape"]]
        return [spec["dtype"], len(spec["shape"]), ones, _order(spec), spec["values"]["kind"], 0 in spec["shape"]]
    if isinstance(value, int) and not isinstance(value, bool) and value > 3:
        return "number"
    if isinstance(value, float) and value not in (0.0, 1.0, -1.0, 2.0):
        return "number"
    return value


def _order(spec: dict[str, Any]) -> Any:
    strides = spec.get("strides")
    return strides and [sorted(range(len(strides)), key=lambda axis: (strides[axis], axis)), 0 in strides]


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(list(value))


def _specs(values: list[Any]) -> Iterator[dict[str, Any]]:
    for value in values:
        if isinstance(value, dict) and "tensor" in value:
            yield value["tensor"]
        elif isinstance(value, list):
            yield from _specs(value)


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
