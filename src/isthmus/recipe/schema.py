"""The recipe: a strict TOML file that says everything a run does.

An unknown key is an error with a suggestion. The resolved recipe (presets merged, overrides applied, defaults
filled in) has one hash, and it is the first file of every run folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
import typing
from abc import abstractmethod
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from isthmus.errors import IsthmusError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PlacedStage = Literal["train", "rollout", "serve"]


class RecipeError(IsthmusError):
    """The recipe cannot be read, or says something it may not say."""


class Section(BaseModel):
    """Base of every recipe section: unknown keys are refused, values cannot change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class YarnScaling(Section):
    """YaRN position scaling (arXiv 2309.00071), with the key names of a DeepSeek-V3 `config.json`."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=1.0)
    original_max_position_embeddings: Positive
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


class Llama3Scaling(Section):
    """Llama 3's position scaling, with the key names of its `config.json`."""

    type: Literal["llama3"] = "llama3"
    factor: float = Field(gt=1.0)
    low_freq_factor: float = Field(gt=0.0)
    high_freq_factor: float = Field(gt=0.0)
    original_max_position_embeddings: Positive

    @model_validator(mode="after")
    def _bands_in_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must exceed low_freq_factor")
        return self


class ModelSection(Section):
    """The architecture, with the key names of a Hugging Face `config.json`; here, what all architectures have.

    `preset` names a file in `isthmus/presets`; `from` names a folder with a checkpoint in that layout. Further keys
    override what either gives.
    """

    model_type: str
    preset: str | None = None
    from_: Path | None = Field(default=None, alias="from")
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_nextn_predict_layers: Literal[0, 1] = 0
    max_position_embeddings: Positive
    rope_theta: float = Field(default=10000.0, gt=0)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    @property
    @abstractmethod
    def cache_width(self) -> int:
        """Numbers that generation keeps per token and layer."""


class DeepseekSection(ModelSection):
    """DeepSeek-V3: latent attention, a fine-grained mixture of experts, multi-token prediction."""

    model_type: Literal["deepseek_v3"] = "deepseek_v3"  # pyright: ignore[reportIncompatibleVariableOverride]
    moe_intermediate_size: Positive
    q_lora_rank: Positive | None = None
    kv_lora_rank: Positive
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive
    v_head_dim: Positive
    n_routed_experts: Positive
    n_shared_experts: Positive = 1
    num_experts_per_tok: Positive
    n_group: Positive = 1
    topk_group: Positive = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    first_k_dense_replace: int = Field(default=1, ge=0)
    swiglu_limit: float | None = Field(default=None, gt=0, description="clamp in front of SwiGLU, as DeepSeek-V4 has")
    num_nextn_predict_layers: Literal[0, 1] = 1
    rope_scaling: YarnScaling | None = None

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

    model_type: Literal["qwen2", "llama"]  # pyright: ignore[reportIncompatibleVariableOverride]
    num_key_value_heads: Positive
    head_dim: Positive | None = Field(default=None, description="hidden_size / num_attention_heads if absent")
    attention_bias: bool | None = Field(
        default=None, description="of llama, on all four projections; qwen2 always has biases on q, k and v"
    )
    rope_scaling: Llama3Scaling | None = None

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


class PoolSection(Section):
    """A number of chips of one kind. `rehearsed` enforces the rules of a chip that is not here on the CPU."""

    chip: str
    count: Positive = 1
    ranks: Positive | None = Field(default=None, description="training processes; one per chip if absent")
    rehearsed: bool = False
    threads: Positive | None = Field(
        default=None, description="compute threads of a process on a CPU; chosen if absent"
    )
    faults: list[str] = Field(
        default_factory=list, description="faults that a rehearsal plants, such as `hang@rank=1,step=3`"
    )

    @model_validator(mode="after")
    def _faults_only_in_a_rehearsal(self) -> Self:
        if self.faults and not self.rehearsed:
            raise ValueError("faults are planted in a rehearsed pool alone; write rehearsed = true, or leave them out")
        return self


class PlaceSection(Section):
    """Pools in order of preference for each placed stage."""

    train: list[str] = Field(min_length=1)
    rollout: list[str] = Field(min_length=1)
    serve: list[str] = Field(min_length=1)


class DataSection(Section):
    """The task. `countdown` is generated; `jsonl` reads the user's own prompts and answers."""

    task: Literal["countdown", "jsonl"] = "countdown"
    numbers: Literal[3] = 3
    largest: int = Field(default=12, ge=2, le=99)
    largest_target: int = Field(default=40, ge=1, le=999)
    heldout_share: Share = 0.2
    teacher_hit: Share = Field(default=0.2, description="chance that the teacher's next try is a solution on purpose")
    teacher_give_up: Share = Field(default=0.35, description="chance that the teacher gives up after a miss")
    teacher_patient: Share = Field(default=0.05, description="share of problems tried at random until one fits")
    train_file: Path | None = None
    heldout_file: Path | None = None

    @model_validator(mode="after")
    def _files_for_jsonl(self) -> Self:
        if self.task == "jsonl" and (self.train_file is None or self.heldout_file is None):
            raise ValueError('task = "jsonl" needs train_file and heldout_file')
        return self


class OptimizerSection(Section):
    """Muon on the matrices, AdamW on the rest; `name = "adamw"` uses AdamW for all."""

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(gt=0)
    matrix_learning_rate: float | None = Field(default=None, gt=0)
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay_share: Share = Field(
        default=0.0, description="share of the steps, at the end, over which the rate falls to its final value"
    )
    decay: Literal["linear", "cosine"] = "linear"
    final_rate: Share = Field(default=0.0, description="the rate at the end, as a share of the learning rate")
    gradient_clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _muon_needs_its_rate(self) -> Self:
        if self.name == "muon" and self.matrix_learning_rate is None:
            raise ValueError('name = "muon" needs matrix_learning_rate')
        return self


class TextSection(Section):
    """What every training on text has."""

    steps: Positive
    optimizer: OptimizerSection
    mtp_weight: float = Field(default=0.3, ge=0)
    balance_alpha: float = Field(default=1e-4, ge=0)
    bias_update_speed: float = Field(default=1e-3, ge=0)
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2


class SftSection(TextSection):
    """Supervised fine-tuning on chains of thought."""

    batch_size: Positive = 64


class PretrainSection(TextSection):
    """Next-token prediction on a folder of text or of token shards, before supervised fine-tuning."""

    folder: Path
    rows_per_step: Positive = 64
    row_length: Annotated[int, Field(ge=8)] = 512


class TrainSection(Section):
    """How the stage `train` computes, whatever it trains on.

    The pool's chips divide into `replicate` groups that hold the whole model each; within a group the parameters are
    sharded, and the routed experts are spread over `expert` chips that exchange tokens.
    """

    precision: Literal["fp32", "bf16"] | None = Field(
        default=None, description="of forward and backward; the master weights are fp32. bf16 if absent, fp32 on a CPU"
    )
    rows_per_microbatch: Positive | None = Field(
        default=None, description="packed rows that a chip computes at once; all of its rows if absent"
    )
    activation_checkpointing: bool = Field(default=False, description="compute layers again in the backward pass")
    compile: bool = Field(default=False, description="torch.compile norms, projections, MLPs and routers")
    replicate: Positive = 1
    expert: Positive = 1
    tensorboard: bool = False


class RlSection(Section):
    """Reinforcement learning with verifiable rewards. `[rl.options]` are the algorithm's own, checked in its file."""

    algorithm: str = "grpo"
    options: dict[str, Any] = Field(default_factory=dict)
    steps: Positive
    prompts_per_step: Positive = 32
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    updates_per_rollout: Positive = 1
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: Positive = 128
    optimizer: OptimizerSection
    importance_cap: float = Field(default=2.0, gt=0, description="truncation of the trainer/engine probability ratio")
    drift_budget: float = Field(default=0.05, gt=0, description="mismatch, nats per token, that a run may drift to")
    format_reward: float = Field(default=0.1, ge=0)
    rollout_format: str = "w8a8"
    staleness: Literal[0, 1] = Field(default=0, description="versions by which samples may lag behind the trainer")
    update: Literal["delta", "full"] = Field(default="delta", description="what crosses at a step: changes, or all")
    update_codec: Literal["zstd", "zlib"] = Field(default="zstd", description="compression of deltas")
    snapshot_every: Positive = Field(default=32, description="versions after which all weights are sent again")
    publish: Path | None = Field(default=None, description="a folder for `isthmus follow` that receives every version")
    parity_tokens: Annotated[int, Field(ge=0)] = Field(
        default=8, description="tokens of each of two prompts that check an engine's new weights; 0: no check"
    )
    parity_every: Positive = Field(default=1, description="versions between two such checks")
    parity_strikes: Positive = Field(default=2, description="failed checks in a row after which the stage is refused")
    checkpoint_every: Positive = 10
    keep_checkpoints: Positive = 2
    heldout_problems: Positive = 500


class HandoffSection(Section):
    """The gate between the trained weights and the bundle that is served; docs/crossing.md says more about each key."""

    format: str = "w8a8"
    balance: bool = Field(default=False, description="move the range of outlier channels into the weights before int8")
    rounding: Literal["nearest", "gptq"] = "nearest"
    calibration_prompts: Positive = Field(default=64, description="training prompts whose answers calibrate a format")
    capture_mb: Positive = Field(default=256, description="size of the golden inputs and outputs in a bundle")
    golden_prompts: Positive = 64
    heldout_problems: Positive = 500
    max_mean_kl: float = Field(default=0.02, gt=0, description="nats per token, bundle against the fp32 reference")
    max_chip_kl: float = Field(default=0.01, gt=0, description="nats per token, target against the exact emulator")
    max_module_error: float = Field(default=0.25, gt=0, description="of a block's output by quantisation, relative")
    min_top1_agreement: Share = 0.95
    max_accuracy_drop: Share = Field(default=0.05, description="non-inferiority margin on the held-out task")
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    sign_key: Path | None = Field(default=None, description="private Ed25519 key that signs the seal")


class ServeSection(Section):
    """The API server and its chat page; docs/serving.md says more about each key."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_batch: Positive = 32
    max_new_tokens: Positive = 256
    temperature: float = Field(default=0.6, ge=0)
    block_size: Positive = Field(default=16, description="tokens per block of the cache")
    cache_tokens: Positive | None = Field(default=None, description="None: max_batch sequences of full length")
    chunk_tokens: Positive = Field(default=512, description="prompt tokens that one step computes at most")
    prefix_cache: bool = True
    speculate: bool = False
    batch_invariant: bool = False
    key_file: Path | None = None
    allow_open: bool = Field(default=False, description="listen beyond this machine without user keys")
    allow_unsealed: bool = Field(default=False, description="serve what no seal vouches for, and say so everywhere")
    trusted_keys: Path | None = Field(default=None, description="public keys, one of which must have signed the seal")
    max_waiting: Positive = Field(default=4096, description="samples in the line")
    max_waiting_tokens: Positive | None = Field(default=None, description="prompt tokens in the line")
    requests_per_minute: Positive | None = Field(default=None, description="of each key")
    tokens_per_minute: Positive | None = Field(default=None, description="of each key, prompts and completions")
    concurrent_requests: Positive | None = Field(default=None, description="of each key")
    drain_seconds: float = Field(default=30.0, ge=0)
    access_log: str | None = Field(default=None, description="a file, stdout, stderr or none; None: the run folder")
    access_log_mib: Positive = Field(default=64, description="size at which the file is rotated")
    log_prompts: bool = False
    canary_minutes: float = Field(default=15.0, ge=0, description="0: only when the administrator asks for one")
    canary_bound: float = Field(default=0.1, gt=0, description="nats by which a log-probability may drift")
    on_drift: Literal["alarm", "rollback"] = "alarm"


class QualifySection(Section):
    """How much a qualification measures."""

    matmul_size: Positive = 512
    memory_mib: Positive = 64
    repeats: Annotated[int, Field(ge=3)] = 10
    pilot_steps: Annotated[int, Field(ge=2)] = 4
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    budget: str | None = Field(
        default=None, description="time for the probes of a pool, such as 30s; no limit if absent"
    )
    soak_s: float = Field(default=12.0, gt=0, description="seconds of real training steps in the soak")
    thresholds: Path | None = Field(default=None, description="a CSV of floors and ceilings beside the package's")
    stall_s: float = Field(default=20.0, gt=0, description="seconds without a sign of life after which a rank hangs")


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


class Recipe(Section):
    """A whole recipe, resolved: presets merged and defaults filled in."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    model: Architecture
    pools: dict[str, PoolSection] = Field(min_length=1)
    place: PlaceSection
    data: DataSection = DataSection()
    qualify: QualifySection = QualifySection()
    train: TrainSection = TrainSection()
    pretrain: PretrainSection | None = None
    sft: SftSection
    rl: RlSection
    handoff: HandoffSection = HandoffSection()
    serve: ServeSection = ServeSection()

    @model_validator(mode="after")
    def _places_name_pools(self) -> Self:
        for stage in typing.get_args(PlacedStage):
            for pool in getattr(self.place, stage):
                if pool not in self.pools:
                    raise ValueError(f"place.{stage} names the pool {pool!r}; the recipe has {', '.join(self.pools)}")
        return self

    @model_validator(mode="after")
    def _ranks_divide(self) -> Self:
        for name in self.place.train:
            pool = self.pools[name]
            if not pool.rehearsed and (problem := layout_problem(self.model, self.train, pool.ranks or pool.count)):
                raise ValueError(f"pool {name!r}: {problem}")
        return self

    def canonical(self) -> str:
        """The resolved recipe as JSON with sorted keys: the text that is hashed and stored."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, indent=2)

    def digest(self) -> str:
        """SHA-256 of `canonical()`, hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def layout_problem(model: ModelSection, train: TrainSection, ranks: int) -> str | None:
    """Why `ranks` processes cannot divide a model as [train] says, or None if they can."""
    product = train.replicate * train.expert
    if ranks % product:
        fitting = " or ".join(str(one) for one in (ranks // product * product, -(-ranks // product) * product) if one)
        return (
            f"training on {ranks} rank{'s' * (ranks > 1)} with train.replicate = {train.replicate} and train.expert = "
            f"{train.expert}: their product must divide the number of ranks, as it does {fitting}"
        )
    if not isinstance(model, DeepseekSection):
        return f"train.expert = {train.expert}, but a dense model has no experts" if train.expert > 1 else None
    if model.n_routed_experts % train.expert:
        return f"train.expert = {train.expert} does not divide the {model.n_routed_experts} routed experts"
    sharing = ranks // train.replicate
    if sharing > model.n_routed_experts:
        return (
            f"{sharing} ranks share the {model.n_routed_experts} routed experts, which are held whole: some ranks "
            "would hold none; raise train.replicate"
        )
    return None


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, override (`a.b=c`), resolve and check a recipe. Raises RecipeError with what to write instead."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}{_nearby_recipes(path)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; a recipe is a .toml file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, origin=path)


def parse_recipe(tree: dict[str, Any], origin: Path | None = None) -> Recipe:
    """Check a recipe given as nested dictionaries. Paths in it are relative to the folder of `origin`."""
    model = tree.get("model")
    if isinstance(model, dict):
        tree = {**tree, "model": _resolve_model(model, origin)}
    for section in ("data", "pretrain", "rl", "serve", "qualify"):
        if isinstance(tree.get(section), dict):
            tree = {**tree, section: _resolve_files(tree[section], origin)}
    return resolved_recipe(tree, origin)


def resolved_recipe(tree: dict[str, Any], origin: Path | None = None) -> Recipe:
    """Check a recipe whose presets are already merged, as a run folder stores it."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, f"{origin or 'the recipe'} is not a valid recipe:")) from None


def override_serve(section: ServeSection, overrides: tuple[str, ...] = (), **changes: Any) -> ServeSection:
    """A [serve] with `changes` that are not None, then with `serve.key=value` overrides."""
    given = {key: value for key, value in changes.items() if value is not None}
    tree: dict[str, Any] = {"serve": {**section.model_dump(), **given}}
    for override in overrides:
        if not override.strip().startswith("serve."):
            raise RecipeError(f"--set {override!r}: a server can only be given other keys of [serve]")
        apply_override(tree, override)
    try:
        return ServeSection.model_validate(tree["serve"])
    except ValidationError as error:
        raise RecipeError(_explain(error, "[serve] is not valid:", ("serve",))) from None


def preset_architecture(name: str, **changes: Any) -> DeepseekSection | DenseSection:
    """An architecture that ships with the package, with some of its keys changed."""
    return parse_architecture({**_read_preset(name), **changes})


def preset_names() -> list[str]:
    """Names of the architectures that ship with the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("isthmus.presets").iterdir()
        if entry.name.endswith(".toml")
    )


def _resolve_model(section: dict[str, Any], origin: Path | None) -> dict[str, Any]:
    if "preset" in section and "from" in section:
        raise RecipeError("[model] has both preset and from; keep one")
    if "preset" in section:
        return {**_read_preset(section["preset"]), **section}
    if "from" in section:
        folder = Path(section["from"])
        if origin is not None and not folder.is_absolute():
            folder = origin.parent / folder
        return {**_read_architecture(folder), **section, "from": str(folder.resolve())}
    return section


def _resolve_files(section: dict[str, Any], origin: Path | None) -> dict[str, Any]:
    """Paths relative to the recipe made absolute."""
    folder = origin.parent if origin else Path()
    files = {key: str((folder / value).resolve()) for key, value in section.items() if _is_path(key)}
    return {**section, **files}


def _is_path(key: str) -> bool:
    return key in ("folder", "publish", "thresholds") or key.endswith("_file")


def _read_preset(name: Any) -> dict[str, Any]:
    entry = resources.files("isthmus.presets") / f"{name}.toml"
    if not entry.is_file():
        raise RecipeError(f"unknown model preset {name!r}{_suggest(str(name), preset_names())}")
    return tomllib.loads(entry.read_text(encoding="utf-8"))


def _read_architecture(folder: Path) -> dict[str, Any]:
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
        raise RecipeError(_explain(error, "the architecture is not valid:", ("model",))) from None


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
    for key, supported in only.items():
        if key in config and config[key] not in supported:
            raise RecipeError(f"{key} = {config[key]!r} is not supported; supported: {supported[0]!r}")
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


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of a recipe given as nested dictionaries, from `section.key=value`. Raises RecipeError."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {override!r}: write --set section.key=value")
    node = tree
    *parents, last = key.strip().split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is a value, not a section")
    node[last] = _override_value(text.strip())


def _override_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, heading: str, within: tuple[str, ...] = ()) -> str:
    lines = [heading]
    for problem in error.errors():
        location = (*within, *problem["loc"])
        where = ".".join(str(part) for part in _without_tag(location))
        if problem["type"] == "extra_forbidden":
            known = _keys_at(location[:-1])
            lines.append(f"  unknown key {where}{_suggest(str(location[-1]), known)}")
        elif problem["type"] == "missing":
            lines.append(f"  {where} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"  {where or 'recipe'}: {message}")
    return "\n".join(lines)


def _without_tag(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A location as the user writes it: pydantic puts the kind of architecture after `model`."""
    tagged = location[:1] == ("model",) and location[1:2] and location[1] in _SECTIONS
    return (location[0], *location[2:]) if tagged else location


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    annotation: Any = Recipe
    for part in location:
        if typing.get_origin(annotation) is dict:  # a table whose keys the user names, such as [pools.*]
            annotation = typing.get_args(annotation)[1]
            continue
        if part in _SECTIONS and _section_in(annotation) in _SECTIONS.values():
            annotation = _SECTIONS[str(part)]
            continue
        section = _section_in(annotation)
        if section is None or part not in section.model_fields:
            return []
        annotation = section.model_fields[str(part)].annotation
    section = _section_in(annotation)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, typing.get_args(annotation))), None)


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def _nearby_recipes(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = [str(candidate) for candidate in sorted(folder.glob("*.toml"))]
    return f"; did you mean one of: {', '.join(names)}?" if names else ""
