"""The architecture: `[model]`, with the key names of a Hugging Face `config.json`."""

from __future__ import annotations

import typing
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from isthmus.lines import read_json_object
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


class RopeScaling(Section):
    """Extension of the context of grouped-query attention, with the key names of a Hugging Face `config.json`."""

    type: str = Field(description="the kind of scaling")
    factor: Number = Field(ge=1.0, description="by how much longer the context becomes")


class LinearScaling(RopeScaling):
    """Every position is divided by the factor."""

    type: Literal["linear"] = key("linear", "the kind of scaling")  # pyright: ignore[reportIncompatibleVariableOverride]


class DynamicScaling(RopeScaling):
    """Dynamic NTK: the base grows with a sequence beyond max_position_embeddings, which is the longest here.

    So nothing is scaled, and a longer sequence is refused.
    """

    type: Literal["dynamic"] = key("dynamic", "the kind of scaling")  # pyright: ignore[reportIncompatibleVariableOverride]


class PlainYarnScaling(RopeScaling):
    """YaRN (arXiv 2309.00071) as Qwen has it: cosines and sines grow by 0.1 ln(factor) + 1, unless a key says more."""

    type: Literal["yarn"] = key("yarn", "the kind of scaling")  # pyright: ignore[reportIncompatibleVariableOverride]
    original_max_position_embeddings: Tokens = Field(description="context length before the scaling")
    beta_fast: Number = key(32.0, "turns over that context from which on a frequency stays as it is")
    beta_slow: Number = key(1.0, "turns over that context up to which a frequency is scaled fully")
    attention_factor: Number | None = key(None, "factor on cosines and sines; by the other keys if absent", gt=0)
    mscale: Number | None = key(None, "growth of cosines and sines with the factor, if mscale_all_dim stands too")
    mscale_all_dim: Number | None = key(None, "what that growth is divided by")
    truncate: bool = key(True, "round the pairs at which the scaling begins and ends to whole ones")


class Llama3Scaling(RopeScaling):
    """Llama 3's position scaling, with the key names of its `config.json`."""

    type: Literal["llama3"] = key("llama3", "the kind of scaling")  # pyright: ignore[reportIncompatibleVariableOverride]
    factor: Number = Field(gt=1.0, description="divisor of the low frequencies")
    low_freq_factor: Number = Field(gt=0.0, description="turns over the old context up to which a frequency is low")
    high_freq_factor: Number = Field(gt=0.0, description="turns over it from which on a frequency stays as it is")
    original_max_position_embeddings: Tokens = Field(description="context length before the scaling")

    @model_validator(mode="after")
    def _bands_in_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must exceed low_freq_factor")
        return self


def _rope_kind(value: Any) -> str | None:
    """Which section a `[model.rope_scaling]` is, by its type."""
    found = value.get("type", "llama3") if isinstance(value, dict) else getattr(value, "type", None)
    return found if found in ROPE_KINDS else None


ROPE_KINDS = ("linear", "dynamic", "yarn", "llama3")
GroupedRope = Annotated[
    Annotated[LinearScaling, Tag("linear")]
    | Annotated[DynamicScaling, Tag("dynamic")]
    | Annotated[PlainYarnScaling, Tag("yarn")]
    | Annotated[Llama3Scaling, Tag("llama3")],
    Discriminator(
        _rope_kind,
        custom_error_type="unknown_rope_type",
        custom_error_message=f"type must be one of {', '.join(ROPE_KINDS)}",
    ),
]


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

    @property
    @abstractmethod
    def rotary_size(self) -> int:
        """Numbers of a head that positions rotate."""

    def is_sparse(self, index: int) -> bool:
        """Whether layer `index` has a mixture of experts; the layer of multi-token prediction comes after the last."""
        return False

    @property
    def sparse_layers(self) -> list[int]:
        """The layers with a mixture of experts, without the one for multi-token prediction."""
        return [index for index in range(self.num_hidden_layers) if self.is_sparse(index)]


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

    @property
    def rotary_size(self) -> int:
        return self.qk_rope_head_dim

    @property
    def routing_bias(self) -> bool:
        """Whether routers have a bias that balances the experts' load."""
        return True

    def is_sparse(self, index: int) -> bool:
        return index >= self.first_k_dense_replace

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


LayerType = Literal["full_attention", "sliding_attention"]
BIASED_BY_KEY = ("llama", "qwen3", "qwen3_moe")
"""Families whose `attention_bias` says whether all four projections of attention have biases."""


class GroupedSection(ModelSection):
    """Grouped-query attention: what the dense models and Qwen3's mixture of experts share."""

    num_key_value_heads: Count = Field(description="heads of keys and values, each shared by several of the queries")
    head_dim: Count | None = key(None, "width of a head; hidden_size / num_attention_heads if absent")
    attention_bias: bool | None = key(
        None, "of llama and qwen3: biases on all four projections; qwen2 always has them on q, k and v, mistral none"
    )
    rope_scaling: GroupedRope | None = key(None, "extension of the context; none if absent")
    sliding_window: Tokens | None = key(
        None, "tokens that a token looks at, itself included; all before it if absent. llama has none"
    )
    layer_types: list[LayerType] | None = key(None, "which layers have the sliding window; all if absent")

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def input_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.model_type == "qwen2" or self.output_bias

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.model_type in BIASED_BY_KEY and bool(self.attention_bias)

    @property
    def head_norms(self) -> bool:
        """Whether each head of queries and keys passes a norm before it is rotated."""
        return self.model_type in ("qwen3", "qwen3_moe")

    @property
    def cache_width(self) -> int:
        return 2 * self.num_key_value_heads * self.head_size

    @property
    def rotary_size(self) -> int:
        return self.head_size

    def window_of(self, index: int) -> int | None:
        """How many tokens a token looks at in layer `index`, itself included; None if at all before it."""
        types = self.layer_types
        return self.sliding_window if types is None or types[index] == "sliding_attention" else None

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
        if self.model_type == "mistral" and self.attention_bias:
            raise ValueError("a mistral model has no biases: leave attention_bias out")
        if self.num_nextn_predict_layers:
            raise ValueError(f"a {self.model_type} model has no multi-token prediction: num_nextn_predict_layers is 0")
        return self

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if self.sliding_window is not None and self.model_type == "llama":
            raise ValueError("a llama model has no sliding window: leave sliding_window out, or write mistral")
        if self.layer_types is None:
            return self
        if self.sliding_window is None:
            raise ValueError("layer_types says which layers have a sliding window: give sliding_window too")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, and num_hidden_layers is {self.num_hidden_layers}"
            )
        return self


class DenseSection(GroupedSection):
    """Qwen2, Qwen3, Llama and Mistral, the models that R1 was distilled into among them: dense, with a gated MLP."""

    model_type: Literal["qwen2", "qwen3", "llama", "mistral"] = Field(description="family of the architecture")  # pyright: ignore[reportIncompatibleVariableOverride]


class Qwen3MoeSection(GroupedSection):
    """Qwen3's mixture of experts: grouped-query attention with a norm on each head, softmax routing, no shared expert.

    Layer i, counted from 0, has experts if (i + 1) is a multiple of decoder_sparse_step and mlp_only_layers does not
    name it; the others have a dense MLP of width intermediate_size.
    """

    model_type: Literal["qwen3_moe"] = Field(description="family of the architecture")  # pyright: ignore[reportIncompatibleVariableOverride]
    moe_intermediate_size: Count = Field(description="inner width of an expert")
    num_experts: Count = Field(description="experts of a layer among which the router chooses")
    num_experts_per_tok: Count = Field(description="experts that a token goes to")
    norm_topk_prob: bool = key(False, "divide the weights of a token's experts by their sum")
    decoder_sparse_step: Count = key(1, "every how many layers one has experts")
    mlp_only_layers: list[Whole] = key([], "layers that have a dense MLP all the same")

    @property
    def n_routed_experts(self) -> int:
        """Experts of a layer, under the name that DeepSeek's config.json has for them."""
        return self.num_experts

    @property
    def n_shared_experts(self) -> int:
        """Experts that see every token: none."""
        return 0

    @property
    def n_group(self) -> int:
        """Groups of experts: one, of all."""
        return 1

    @property
    def topk_group(self) -> int:
        """Groups that a token may go to."""
        return 1

    @property
    def routed_scaling_factor(self) -> float:
        """Factor on the weights of the experts: none."""
        return 1.0

    @property
    def scoring_func(self) -> Literal["sigmoid", "softmax"]:
        """What makes scores of router outputs."""
        return "softmax"

    @property
    def routing_bias(self) -> bool:
        """Whether routers have a bias that balances the experts' load."""
        return False

    @property
    def swiglu_limit(self) -> float | None:
        """Clamp in front of SwiGLU: none."""
        return None

    def is_sparse(self, index: int) -> bool:
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {self.num_experts} experts")
        if outside := [index for index in self.mlp_only_layers if not 0 <= index < self.num_hidden_layers]:
            raise ValueError(f"mlp_only_layers names layer {outside[0]}, and there are {self.num_hidden_layers}")
        return self


MixtureSection = DeepseekSection | Qwen3MoeSection
"""The architectures with a mixture of experts. All say `n_routed_experts`, `num_experts_per_tok` and so on."""


def _architecture_kind(value: Any) -> str | None:
    """Which section a `[model]` is, by its model_type: a key of `_SECTIONS`, or None if no section has that type."""
    fields = value if isinstance(value, dict) else vars(value) if isinstance(value, ModelSection) else {}
    model_type = fields.get("model_type", DEFAULT_MODEL_TYPE)
    return next((kind for kind, section in _SECTIONS.items() if model_type in _model_types(section)), None)


def _model_types(section: type[Section]) -> tuple[str, ...]:
    return typing.get_args(section.model_fields["model_type"].annotation)


DEFAULT_MODEL_TYPE = "deepseek_v3"
AnySection = DeepseekSection | DenseSection | Qwen3MoeSection
_SECTIONS: dict[str, type[AnySection]] = {
    "deepseek": DeepseekSection,
    "dense": DenseSection,
    "qwen3_moe": Qwen3MoeSection,
}
MODEL_TYPES = tuple(name for section in _SECTIONS.values() for name in _model_types(section))
ALIASES = {"kimi_k2": "deepseek_v3"}
"""Other names of a family in config.json. Kimi K2 has DeepSeek-V3's layers."""
Architecture = Annotated[
    Annotated[DeepseekSection, Tag("deepseek")]
    | Annotated[DenseSection, Tag("dense")]
    | Annotated[Qwen3MoeSection, Tag("qwen3_moe")],
    Discriminator(
        _architecture_kind,
        custom_error_type="unknown_model_type",
        custom_error_message=f"model_type must be one of {', '.join(MODEL_TYPES)}",
    ),
]
_ARCHITECTURE: TypeAdapter[AnySection] = TypeAdapter(Architecture)


def read_architecture(folder: Path) -> dict[str, Any]:
    try:
        config = read_json_object(folder / "config.json", RecipeError)
    except FileNotFoundError:
        raise RecipeError(f"[model] from = {str(folder)!r}: there is no config.json in that folder") from None
    try:
        return architecture_from_config(config)
    except RecipeError as error:
        raise RecipeError(f"{folder / 'config.json'}: {error}") from None


def parse_architecture(fields: dict[str, Any]) -> AnySection:
    """The architecture that these keys of `[model]` describe. Raises RecipeError naming each wrong one."""
    try:
        return _ARCHITECTURE.validate_python(fields)
    except ValidationError as error:
        raise RecipeError(explain(error, "the architecture is not valid:", Architecture, ("model",))) from None


def architecture_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of `[model]` found in a Hugging Face `config.json`, rope parameters of either layout included.

    Of a model that also sees it is the text model, in `text_config`. A key that is absent has the value that
    transformers gives it. Raises RecipeError for a setting that would change what the model computes and that is not
    supported.
    """
    config = text_config(config)
    named = str(config.get("model_type"))
    model_type = ALIASES.get(named, named)
    kind = _architecture_kind({"model_type": model_type})
    if kind is None:
        raise RecipeError(
            f"model_type {config.get('model_type')!r} is not read; read: {', '.join((*MODEL_TYPES, *ALIASES))}"
        )
    _refuse_unsupported(config, {**_ONLY[kind], **_ONLY["all"]})
    names = set(_SECTIONS[kind].model_fields) - {"preset", "from_", "rope_scaling", *_WINDOW_KEYS}
    if "num_local_experts" in config:  # as transformers 5 writes what published files call num_experts
        config = {"num_experts": config["num_local_experts"], **config}
    given = {**TRANSFORMERS_DEFAULTS[model_type], **config, "model_type": model_type}
    found = {key: value for key, value in given.items() if key in names}
    if kind == "deepseek":
        return {**found, **_rope(config, kind, given["max_position_embeddings"])}
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = config.get("num_attention_heads")
    if found.get("mlp_only_layers", ()) is None:
        found["mlp_only_layers"] = []
    return {**found, **_windows(config, model_type), **_rope(config, kind, given["max_position_embeddings"])}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the text model: what it nests under `text_config`, or all of it."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and config.get("model_type") not in (*MODEL_TYPES, *ALIASES):
        return nested
    return config


_COMMON: dict[str, Any] = {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
TRANSFORMERS_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_COMMON,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 0,
    },
    "qwen2": {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "llama": {**_COMMON, "max_position_embeddings": 2048, "num_key_value_heads": None, "attention_bias": False},
    "mistral": {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen3": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
    "qwen3_moe": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""What transformers 5.24 takes for a key that config.json leaves out (`configuration_*.py` of each family).

Sizes that every published file has stay required. A file that says nothing of multi-token prediction has no such layer:
it was written by a transformers that does not know it.
"""
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "all": {"hidden_act": ("silu",), "attention_dropout": (0, None), "partial_rotary_factor": (1, None)},
    "deepseek": {
        "attention_bias": (False, None),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
    },
    "dense": {"mlp_bias": (False, None), "swiglu_limit": (None,)},
    "qwen3_moe": {"mlp_bias": (False, None), "swiglu_limit": (None,)},
}
_ROPE_KINDS: dict[str, dict[str, type[Section]]] = {
    "deepseek": {"yarn": YarnScaling},
    "dense": {"linear": LinearScaling, "dynamic": DynamicScaling, "yarn": PlainYarnScaling, "llama3": Llama3Scaling},
}
_ROPE_KINDS["qwen3_moe"] = _ROPE_KINDS["dense"]


def _refuse_unsupported(config: dict[str, Any], only: dict[str, tuple[Any, ...]]) -> None:
    for name, supported in only.items():
        if name in config and config[name] not in supported:
            raise RecipeError(f"{name} = {config[name]!r} is not supported; supported: {supported[0]!r}")
    others = [layer for layer in config.get("layer_types") or [] if layer not in typing.get_args(LayerType)]
    if others:
        raise RecipeError(f"layer_types has {others[0]!r}; supported: {', '.join(typing.get_args(LayerType))}")


_WINDOW_KEYS = ("sliding_window", "layer_types")


def _windows(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The window, and the layers that have it if it is not all: by family, as transformers reads these keys.

    mistral and qwen3_moe have it in every layer, qwen2 and qwen3 from max_window_layers on or as layer_types says.
    """
    types = config.get("layer_types")
    if model_type == "mistral":
        window = config.get("sliding_window", 4096)
    else:
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    if model_type == "llama" and config.get("sliding_window") and config.get("use_sliding_window", True):
        raise RecipeError("a llama model has no sliding window; supported: sliding_window absent or null")
    if window is None:
        if types and "sliding_attention" in types:
            raise RecipeError(
                "layer_types has 'sliding_attention', and there is no sliding window (use_sliding_window)"
            )
        return {"sliding_window": None, "layer_types": None}
    if model_type in ("mistral", "qwen3_moe"):
        if types and "full_attention" in types:
            raise RecipeError(f"layer_types has 'full_attention', and every layer of a {model_type} has the window")
        return {"sliding_window": window, "layer_types": None}
    depth, first = config.get("num_hidden_layers") or 0, config.get("max_window_layers", 28)
    if types is None:
        types = ["sliding_attention" if index >= first else "full_attention" for index in range(depth)]
    if "sliding_attention" not in types:
        return {"sliding_window": None, "layer_types": None}
    return {"sliding_window": window, "layer_types": types if "full_attention" in types else None}


def _rope(config: dict[str, Any], kind: str, context: int) -> dict[str, Any]:
    """`rope_theta` and `[model.rope_scaling]` of a config.json of either layout; `context` is its longest sequence."""
    rope = {**(config.get("rope_scaling") or {}), **_flat_rope(config.get("rope_parameters") or {})}
    rope = {key: value for key, value in rope.items() if value is not None}
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise RecipeError("partial_rotary_factor other than 1 is not supported")
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    rope["original_max_position_embeddings"] = config.get(
        "original_max_position_embeddings", rope.get("original_max_position_embeddings", context)
    )
    return {"rope_theta": theta, "rope_scaling": _rope_scaling(rope, kind)}


def _flat_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 may nest rope parameters by the type of layer; they have to be the same for all."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    if not nested:
        return parameters
    if any(one != nested[0] for one in nested) or len(nested) != len(parameters):
        raise RecipeError(
            f"rope_parameters differ by type of layer ({', '.join(parameters)}); supported: the same for every layer"
        )
    return nested[0]


def _rope_scaling(rope: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """`[model.rope_scaling]` from the rope parameters of a config.json."""
    found = rope.get("rope_type", rope.get("type", "default"))
    supported = _ROPE_KINDS[kind]
    if found != "default" and found not in supported:
        raise RecipeError(f"rope type {found!r} is not supported; supported: default, {', '.join(supported)}")
    fields = supported[found].model_fields.keys() if found != "default" else set()
    values = {key: value for key, value in rope.items() if key not in ("type", "rope_type")}
    if "original_max_position_embeddings" not in fields:
        del values["original_max_position_embeddings"]
    if unknown := sorted(values.keys() - fields):
        raise RecipeError(f"the {found} rope parameter {unknown[0]} = {values[unknown[0]]!r} is not supported")
    if found == "default":
        return None
    absent = {"mscale_all_dim": 0.0} if kind == "deepseek" else {}  # as in DeepSeek's modeling_deepseek.py
    return {"type": found, **absent, **values}
