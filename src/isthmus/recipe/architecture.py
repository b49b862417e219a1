"""The architecture: `[model]`, with the key names of a Hugging Face `config.json`."""

from __future__ import annotations

import json
import typing
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from isthmus.recipe.explain import explain
from isthmus.recipe.section import Count, Number, RecipeError, Section, Tokens, Unit, Whole, key


class YarnScaling(Section):
    """YaRN position scaling (arXiv 2309.00071), with the key names of a DeepSeek-V3 `config.json`."""

    type: Literal["yarn"] = key("yarn", "the kind of scaling")
    factor: Number = Field(gt=1.0, description="by how much longer the context becomes")
    original_max_position_embeddings: Tokens = Field(description="context length before the scaling")
    beta_fast: Number = key(32.0, "turns over that context from which on a frequency stays as it is")
    beta_slow: Number = key(1.0, "turns over that context up to which a frequency is scaled fully")
    mscale: Number = key(1.0, "growth of cosines and sines with the factor, over that of mscale_all_dim")
    mscale_all_dim: Number = key(1.0, "growth of the attention scores with the factor, squared")


class Llama3Scaling(Section):
    """Llama 3's position scaling, with the key names of its `config.json`."""

    type: Literal["llama3"] = key("llama3", "the kind of scaling")
    factor: Number = Field(gt=1.0, description="divisor of the low frequencies")
    low_freq_factor: Number = Field(gt=0.0, description="turns over the old context up to which a frequency is low")
    high_freq_factor: Number = Field(gt=0.0, description="turns over it from which on a frequency stays as it is")
    original_max_position_embeddings: Tokens = Field(description="context length before the scaling")

    @model_validator(mode="after")
    def _bands_in_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must exceed low_freq_factor")
        return self


class ModelSection(Section):
    """The architecture, with the key names of a Hugging Face `config.json`; here, what all architectures have.

    `preset` or `from` gives every key that is required; further keys override what either gives.
    """

    model_type: str = Field(description="family of the architecture, which says what further keys there are")
    preset: str | None = key(None, "an architecture that ships with the package, such as r-nano")
    from_: Path | None = key(None, "folder of a checkpoint: its config.json and weights", alias="from")
    vocab_size: Tokens = Field(description="rows of the embedding; the tokenizer may have fewer tokens")
    hidden_size: Count = Field(description="width of the residual stream")
    intermediate_size: Count = Field(description="inner width of a dense MLP")
    num_hidden_layers: Count = Field(description="layers, without the one for multi-token prediction")
    num_attention_heads: Count = Field(description="heads of the queries")
    num_nextn_predict_layers: Annotated[Literal[0, 1], Unit("1")] = key(0, "layers for multi-token prediction")
    max_position_embeddings: Tokens = Field(description="longest sequence")
    rope_theta: Number = key(10000.0, "base of the rotary frequencies", gt=0)
    rms_norm_eps: Number = key(1e-6, "added to the mean square in norms")
    initializer_range: Number = key(0.02, "standard deviation of new weights")
    tie_word_embeddings: bool = key(False, "use the embedding as the output head too")

    @property
    @abstractmethod
    def cache_width(self) -> int:
        """Numbers that generation keeps per token and layer."""


class DeepseekSection(ModelSection):
    """DeepSeek-V3: latent attention, a fine-grained mixture of experts, multi-token prediction."""

    model_type: Literal["deepseek_v3"] = key("deepseek_v3", "family of the architecture")  # pyright: ignore[reportIncompatibleVariableOverride]
    moe_intermediate_size: Count = Field(description="inner width of an expert")
    q_lora_rank: Count | None = key(None, "width of the latent of queries; no latent if absent")
    kv_lora_rank: Count = Field(description="width of the latent of keys and values, which is cached")
    qk_nope_head_dim: Count = Field(description="width of a head's queries and keys without positions")
    qk_rope_head_dim: Count = Field(description="width of a head's queries and keys with rotary positions")
    v_head_dim: Count = Field(description="width of a head's values")
    n_routed_experts: Count = Field(description="experts of a layer among which the router chooses")
    n_shared_experts: Count = key(1, "experts of a layer that see every token")
    num_experts_per_tok: Count = Field(description="routed experts that a token goes to")
    n_group: Count = key(1, "groups of routed experts")
    topk_group: Count = key(1, "groups that a token may go to")
    norm_topk_prob: bool = key(True, "divide the weights of a token's experts by their sum")
    routed_scaling_factor: Number = key(1.0, "factor on the weights of the routed experts")
    scoring_func: Literal["sigmoid", "softmax"] = key("sigmoid", "what makes scores of router outputs")
    first_k_dense_replace: Whole = key(1, "first layers that have a dense MLP", ge=0)
    swiglu_limit: Number | None = key(None, "clamp in front of SwiGLU, as DeepSeek-V4 has; none if absent", gt=0)
    num_nextn_predict_layers: Annotated[Literal[0, 1], Unit("1")] = key(1, "layers for multi-token prediction")
    rope_scaling: YarnScaling | None = key(None, "extension of the context; none if absent")

    @property
    def cache_width(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts ({self.n_routed_experts}) must be a multiple of n_group ({self.n_group})"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) exceeds n_group ({self.n_group})")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {reachable} reachable experts"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError("qk_rope_head_dim must be even: rotary embedding turns pairs")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError("first_k_dense_replace exceeds num_hidden_layers")
        return self


class DenseSection(ModelSection):
    """Qwen2 and Llama 3, the dense models that R1 was distilled into: grouped-query attention and a gated MLP."""

    model_type: Literal["qwen2", "llama"] = Field(description="family of the architecture")  # pyright: ignore[reportIncompatibleVariableOverride]
    num_key_value_heads: Count = Field(description="heads of keys and values, each shared by several of the queries")
    head_dim: Count | None = key(None, "width of a head; hidden_size / num_attention_heads if absent")
    attention_bias: bool | None = key(
        None, "of llama: biases on all four projections; qwen2 always has them on q, k and v"
    )
    rope_scaling: Llama3Scaling | None = key(None, "extension of the context; none if absent")

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def input_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.model_type == "qwen2" or bool(self.attention_bias)

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.model_type == "llama" and bool(self.attention_bias)

    @property
    def cache_width(self) -> int:
        return 2 * self.num_key_value_heads * self.head_size

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads, or head_dim be given")
        if self.head_size % 2:
            raise ValueError(f"head_dim ({self.head_size}) must be even: rotary embedding turns pairs")
        if self.model_type == "qwen2" and self.attention_bias is False:
            raise ValueError("a qwen2 model has biases on q, k and v: leave attention_bias out")
        if self.num_nextn_predict_layers:
            raise ValueError(f"a {self.model_type} model has no multi-token prediction: num_nextn_predict_layers is 0")
        return self


def _architecture_kind(value: Any) -> str | None:
    """Which section a `[model]` is, by its model_type: a key of `_SECTIONS`, or None if no section has that type."""
    fields = value if isinstance(value, dict) else vars(value) if isinstance(value, ModelSection) else {}
    model_type = fields.get("model_type", DEFAULT_MODEL_TYPE)
    return next((kind for kind, section in _SECTIONS.items() if model_type in _model_types(section)), None)


def _model_types(section: type[Section]) -> tuple[str, ...]:
    return typing.get_args(section.model_fields["model_type"].annotation)


DEFAULT_MODEL_TYPE = "deepseek_v3"
_SECTIONS: dict[str, type[DeepseekSection | DenseSection]] = {"deepseek": DeepseekSection, "dense": DenseSection}
MODEL_TYPES = tuple(name for section in _SECTIONS.values() for name in _model_types(section))
Architecture = Annotated[
    Annotated[DeepseekSection, Tag("deepseek")] | Annotated[DenseSection, Tag("dense")],
    Discriminator(
        _architecture_kind,
        custom_error_type="unknown_model_type",
        custom_error_message=f"model_type must be one of {', '.join(MODEL_TYPES)}",
    ),
]
_ARCHITECTURE: TypeAdapter[DeepseekSection | DenseSection] = TypeAdapter(Architecture)


def read_architecture(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"[model] from = {str(folder)!r}: there is no config.json in that folder") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{folder / 'config.json'} is not a JSON object")
    try:
        return architecture_from_config(config)
    except RecipeError as error:
        raise RecipeError(f"{folder / 'config.json'}: {error}") from None


def parse_architecture(fields: dict[str, Any]) -> DeepseekSection | DenseSection:
    """The architecture that these keys of `[model]` describe. Raises RecipeError naming each wrong one."""
    try:
        return _ARCHITECTURE.validate_python(fields)
    except ValidationError as error:
        raise RecipeError(explain(error, "the architecture is not valid:", Architecture, ("model",))) from None


def architecture_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of `[model]` found in a Hugging Face `config.json`, rope parameters of either layout included.

    Raises RecipeError for a setting that would change what the model computes and that is not supported.
    """
    kind = _architecture_kind({"model_type": None, **config})
    if kind is None:
        raise RecipeError(f"model_type {config.get('model_type')!r} is not read; read: {', '.join(MODEL_TYPES)}")
    _refuse_unsupported(config, {**_ONLY[kind], **_ONLY["all"]})
    names = set(_SECTIONS[kind].model_fields) - {"preset", "from_", "rope_scaling"}
    found = {key: value for key, value in config.items() if key in names}
    if kind == "deepseek":
        found.setdefault("num_nextn_predict_layers", 0)
    elif found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = config.get("num_attention_heads")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise RecipeError("partial_rotary_factor other than 1 is not supported")
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    found["rope_scaling"] = _rope_scaling(rope, kind)
    return found


_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "all": {"hidden_act": ("silu",), "attention_dropout": (0, None), "partial_rotary_factor": (1, None)},
    "deepseek": {
        "attention_bias": (False, None),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
    },
    "dense": {"mlp_bias": (False, None), "use_sliding_window": (False, None), "swiglu_limit": (None,)},
}
_ROPE_KINDS: dict[str, tuple[str, type[YarnScaling | Llama3Scaling]]] = {
    "deepseek": ("yarn", YarnScaling),
    "dense": ("llama3", Llama3Scaling),
}


def _refuse_unsupported(config: dict[str, Any], only: dict[str, tuple[Any, ...]]) -> None:
    for name, supported in only.items():
        if name in config and config[name] not in supported:
            raise RecipeError(f"{name} = {config[name]!r} is not supported; supported: {supported[0]!r}")
    windowed = [layer for layer in config.get("layer_types") or [] if layer != "full_attention"]
    if windowed:
        raise RecipeError(f"layer_types has {windowed[0]!r}; supported: 'full_attention' in every layer")


def _rope_scaling(rope: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """`[model.rope_scaling]` from the rope parameters of a config.json."""
    found = rope.get("rope_type", rope.get("type", "default"))
    if found == "default":
        return None
    supported, section = _ROPE_KINDS[kind]
    if found != supported:
        raise RecipeError(f"rope type {found!r} is not supported; supported: default, {supported}")
    values = {key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")}
    if unknown := sorted(values.keys() - section.model_fields.keys()):
        raise RecipeError(f"the {found} rope parameter {unknown[0]} = {values[unknown[0]]!r} is not supported")
    absent = {"mscale_all_dim": 0.0} if found == "yarn" else {}  # as in DeepSeek's modeling_deepseek.py
    return {"type": found, **absent, **values}
