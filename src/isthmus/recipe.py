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
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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


class ModelSection(Section):
    """The architecture, with the key names of a DeepSeek-V3 `config.json`.

    `preset` names a file in `isthmus/presets`; `from` names a folder with a checkpoint in that layout. Further keys
    override what either gives.
    """

    preset: str | None = None
    from_: Path | None = Field(default=None, alias="from")
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    moe_intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
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
    scoring_func: Literal["sigmoid"] = "sigmoid"
    first_k_dense_replace: int = Field(default=1, ge=0)
    num_nextn_predict_layers: Literal[0, 1] = 1
    max_position_embeddings: Positive
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

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


class PoolSection(Section):
    """A number of chips of one kind. `rehearsed` enforces the rules of a chip that is not here on the CPU."""

    chip: str
    count: Positive = 1
    rehearsed: bool = False
    threads: Positive | None = Field(
        default=None, description="compute threads of a process on a CPU; chosen if absent"
    )


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
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay_share: Share = Field(
        default=0.0, description="share of the steps, at the end, over which the rate falls to 0"
    )
    gradient_clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _muon_needs_its_rate(self) -> Self:
        if self.name == "muon" and self.matrix_learning_rate is None:
            raise ValueError('name = "muon" needs matrix_learning_rate')
        return self


class SftSection(Section):
    """Supervised fine-tuning on chains of thought."""

    steps: Positive
    batch_size: Positive = 64
    optimizer: OptimizerSection
    mtp_weight: float = Field(default=0.3, ge=0)
    balance_alpha: float = Field(default=1e-4, ge=0)
    bias_update_speed: float = Field(default=1e-3, ge=0)
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2


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
    format_reward: float = Field(default=0.1, ge=0)
    rollout_format: str = "w8a8"
    staleness: Literal[0, 1] = Field(default=0, description="versions by which samples may lag behind the trainer")
    checkpoint_every: Positive = 10
    keep_checkpoints: Positive = 2
    heldout_problems: Positive = 500


class HandoffSection(Section):
    """The gate between the trained weights and the bundle that is served."""

    format: str = "w8a8"
    golden_prompts: Positive = 64
    heldout_problems: Positive = 500
    max_mean_kl: float = Field(default=0.02, gt=0, description="nats per token, bundle against the fp32 reference")
    min_top1_agreement: Share = 0.95
    max_accuracy_drop: Share = Field(default=0.05, description="non-inferiority margin on the held-out task")
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)


class ServeSection(Section):
    """The API server and its chat page."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_batch: Positive = 32
    max_new_tokens: Positive = 256
    temperature: float = Field(default=0.6, ge=0)


class QualifySection(Section):
    """How much a qualification measures."""

    matmul_size: Positive = 512
    memory_mib: Positive = 64
    repeats: Annotated[int, Field(ge=3)] = 10
    pilot_steps: Annotated[int, Field(ge=2)] = 4
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)


class Recipe(Section):
    """A whole recipe, resolved: presets merged and defaults filled in."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    model: ModelSection
    pools: dict[str, PoolSection] = Field(min_length=1)
    place: PlaceSection
    data: DataSection = DataSection()
    qualify: QualifySection = QualifySection()
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

    def canonical(self) -> str:
        """The resolved recipe as JSON with sorted keys: the text that is hashed and stored."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, indent=2)

    def digest(self) -> str:
        """SHA-256 of `canonical()`, hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


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
        _apply_override(tree, override)
    return parse_recipe(tree, origin=path)


def parse_recipe(tree: dict[str, Any], origin: Path | None = None) -> Recipe:
    """Check a recipe given as nested dictionaries. Paths in it are relative to the folder of `origin`."""
    model, data = tree.get("model"), tree.get("data")
    if isinstance(model, dict):
        tree = {**tree, "model": _resolve_model(model, origin)}
    if isinstance(data, dict):
        tree = {**tree, "data": _resolve_files(data, origin)}
    return resolved_recipe(tree, origin)


def resolved_recipe(tree: dict[str, Any], origin: Path | None = None) -> Recipe:
    """Check a recipe whose presets are already merged, as a run folder stores it."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, origin)) from None


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
    files = {key: str((folder / value).resolve()) for key, value in section.items() if key.endswith("_file")}
    return {**section, **files}


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
    if config.get("model_type") != "deepseek_v3":
        raise RecipeError(
            f"{folder / 'config.json'} has model_type {config.get('model_type')!r}; only deepseek_v3 is read"
        )
    return architecture_from_config(config)


def architecture_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of `ModelSection` found in a DeepSeek-V3 `config.json`, rope parameters of either layout included."""
    fields = set(ModelSection.model_fields) - {"preset", "from_"}
    found = {key: value for key, value in config.items() if key in fields}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        found["rope_scaling"] = None
    elif kind == "yarn":
        found["rope_scaling"] = {
            "type": "yarn",
            **{k: rope[k] for k in YarnScaling.model_fields if k in rope and k != "type"},
        }
    else:
        raise RecipeError(f"rope type {kind!r} is not supported; supported: default, yarn")
    return found


def _apply_override(tree: dict[str, Any], override: str) -> None:
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


def _explain(error: ValidationError, origin: Path | None) -> str:
    lines = [f"{origin or 'the recipe'} is not a valid recipe:"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys_at(problem["loc"][:-1])
            lines.append(f"  unknown key {where}{_suggest(str(problem['loc'][-1]), known)}")
        elif problem["type"] == "missing":
            lines.append(f"  {where} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"  {where or 'recipe'}: {message}")
    return "\n".join(lines)


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    annotation: Any = Recipe
    for part in location:
        if typing.get_origin(annotation) is dict:  # a table whose keys the user names, such as [pools.*]
            annotation = typing.get_args(annotation)[1]
            continue
        section = _section_in(annotation)
        if section is None or part not in section.model_fields:
            return []
        annotation = section.model_fields[str(part)].annotation
    section = _section_in(annotation)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _section_in(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def _nearby_recipes(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = [str(candidate) for candidate in sorted(folder.glob("*.toml"))]
    return f"; did you mean one of: {', '.join(names)}?" if names else ""
