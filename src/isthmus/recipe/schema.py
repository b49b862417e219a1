"""The recipe: a strict TOML file that says everything a run does.

An unknown key is an error with a suggestion. The resolved recipe (presets merged, overrides applied, defaults
filled in) has one hash, and it is the first file of every run folder.
"""

from __future__ import annotations

import hashlib
import json
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from isthmus.recipe.architecture import Architecture, DeepseekSection, ModelSection
from isthmus.recipe.section import Positive, Section, Share

PlacedStage = Literal["train", "rollout", "serve"]


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

    def precision_on(self, device: str) -> Literal["fp32", "bf16"]:
        """What is chosen on a torch device type."""
        return self.precision or ("fp32" if device == "cpu" else "bf16")


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
