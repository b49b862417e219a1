"""The steps of a recipe: what each kind of training may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from isthmus.recipe.section import (
    Count,
    Nats,
    Number,
    Positive,
    Section,
    Share,
    Steps,
    Tokens,
    Unit,
    Whole,
    key,
)

Problems = Annotated[Positive, Unit("problems")]
Prompts = Annotated[Positive, Unit("prompts")]
Rows = Annotated[Positive, Unit("rows")]
Versions = Annotated[Positive, Unit("versions")]


class OptimizerSection(Section):
    """Muon on the matrices, AdamW on the rest; `name = "adamw"` uses AdamW for all."""

    name: Literal["muon", "adamw"] = key("muon", "what updates the hidden matrices")
    learning_rate: Number = Field(gt=0, description="rate of AdamW after the warm-up")
    matrix_learning_rate: Number | None = key(None, "rate of Muon after the warm-up; muon needs it", gt=0)
    betas: tuple[Share, Share] = key((0.9, 0.95), "how much AdamW keeps of its two moments at a step")
    weight_decay: Number = key(0.0, "decoupled: a step takes this times its rate off each weight", ge=0)
    warmup_steps: Annotated[int, Unit("steps")] = key(0, "steps over which the rate rises linearly", ge=0)
    decay_share: Share = key(0.0, "share of the steps, at the end, over which the rate falls to its final value")
    decay: Literal["linear", "cosine"] = key("linear", "how the rate falls")
    final_rate: Share = key(0.0, "the rate at the end, as a share of the learning rate")
    gradient_clip: Number = key(1.0, "largest norm of the whole gradient; a longer one is scaled", gt=0)

    @model_validator(mode="after")
    def _muon_needs_its_rate(self) -> Self:
        if self.name == "muon" and self.matrix_learning_rate is None:
            raise ValueError('name = "muon" needs matrix_learning_rate')
        return self


class StepSection(Section):
    """One act of training, from the weights of another step or of a model, that leaves weights or data."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="name of the step; its folder is steps/NAME")
    from_: str | None = Field(
        default=None,
        alias="from",
        description="the step whose weights it starts from, or `model`; the first step may leave it out",
    )
    model: str | None = key(None, "of a step that starts from a model: which of [models.NAME]; [model] if absent")


class TextSection(StepSection):
    """What every training on text has."""

    steps: Steps = Field(description="updates in all")
    optimizer: OptimizerSection = Field(description="what turns gradients into updates")
    mtp_weight: Number = key(0.3, "weight of multi-token prediction in the loss; 0: not trained", ge=0)
    balance_alpha: Number = key(1e-4, "weight of the sequence-wise balance of experts in the loss", ge=0)
    bias_update_speed: Number = key(1e-3, "step of a router's biases towards balance", ge=0)
    checkpoint_every: Steps = key(100, "steps between two checkpoints")
    keep_checkpoints: Count = key(2, "newest checkpoints that are kept")


def _weights(value: Any) -> Any:
    """A list of names means that all weigh the same."""
    return (
        dict.fromkeys(value, 1.0) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value
    )


Mix = Annotated[dict[str, Annotated[Number, Field(gt=0)]], BeforeValidator(_weights)]
"""What a step draws from, by name, with the weight of each."""


class SftSection(TextSection):
    """Supervised fine-tuning on chains of thought."""

    kind: Literal["sft"] = Field(description="what the step does")
    data: Mix = key({}, "tasks with worked examples, and steps of kind `sample`, by weight; all tasks if absent")
    batch_size: Annotated[Positive, Unit("examples")] = key(64, "worked examples of a step, on all ranks")


class PretrainSection(TextSection):
    """Next-token prediction on a folder of text or of token shards, before supervised fine-tuning."""

    kind: Literal["pretrain"] = Field(description="what the step does")
    folder: Path = Field(description="*.txt, *.jsonl with `text`, or token shards")
    rows_per_step: Rows = key(64, "packed rows of a step, on all ranks")
    row_length: Annotated[int, Unit("tokens")] = key(512, "length of a packed row", ge=8)


class LossSection(Section):
    """What a loss may have beside its algorithm's own formula. What an algorithm cannot honour it refuses by name.

    With r = trainer / engine of a sampled token's probability, "truncate" weighs its loss by min(r, cap), "mask" by r
    where floor <= r <= cap and by 0 elsewhere (IcePop, ringtech.notion.site/icepop, 2025), "none" by 1.
    """

    importance: Literal["truncate", "mask", "none"] = key("truncate", "what becomes of the trainer/engine ratio")
    importance_cap: Number = key(2.0, "truncation of the trainer/engine probability ratio, or end of its mask", gt=0)
    importance_floor: Number | None = key(None, "where a mask begins; IcePop has 0.5, and a cap of 5", gt=0)
    off_policy_mask: Nats | None = key(
        None, "samples of negative advantage are left out whose mean log(engine / trainer) is above this (V3.2)"
    )
    router_replay: bool = key(
        False, "the learner sends each token to the experts that the engine sent it to (arXiv 2510.11370)"
    )
    keep_sampling_mask: bool = key(
        False, "log-probabilities are of the tokens that top_p, top_k and min_p kept when the engine drew (V3.2)"
    )
    kl_weight: Number = key(0.0, "weight of the k3 estimate of the KL to the weights that the step began with", ge=0)
    kl_times_ratio: bool = key(False, "k3 times trainer now / trainer before, which has no bias (V3.2)")

    @model_validator(mode="after")
    def _keys_that_need_others(self) -> Self:
        if (self.importance == "mask") != (self.importance_floor is not None):
            raise ValueError('importance = "mask" needs importance_floor, and nothing else has it')
        if self.importance_floor is not None and self.importance_floor >= self.importance_cap:
            raise ValueError(f"importance_floor must be below importance_cap, {self.importance_cap:g}")
        if self.kl_times_ratio and not self.kl_weight:
            raise ValueError("kl_times_ratio multiplies a term that has no weight: set kl_weight")
        return self


class TeacherSection(Section):
    """Whose log-probabilities on-policy distillation learns: those of another step's weights, or of a server.

    The server scores prompts at temperature 1, as ours, vLLM, or what has vLLM's `prompt_logprobs` does. Either needs
    the student's tokenizer.
    """

    step: str | None = key(None, "a step whose weights teach")
    url: str | None = key(None, "an OpenAI-compatible server")
    key_variable: str | None = key(None, "environment variable with the server's API key")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.step is None) == (self.url is None):
            raise ValueError("a teacher is a step or a url: give one of them")
        return self


class RlSection(StepSection):
    """Reinforcement learning with verifiable rewards. `options` are the algorithm's own, checked in its file."""

    kind: Literal["rl"] = Field(description="what the step does")
    tasks: Mix = key({}, "tasks whose prompts it samples, by weight; all tasks if absent")
    rewards: dict[str, Annotated[Number, Field(ge=0)]] = key(
        {"accuracy": 1.0, "format": 0.1}, "what a sample earns, by weight: files in isthmus/rewards", min_length=1
    )
    algorithm: str = key("grpo", "what makes a loss of rewards: a file in isthmus/algos")
    options: dict[str, Any] = key({}, "options of the algorithm")
    steps: Steps = Field(description="rollouts in all, each followed by its updates")
    prompts_per_step: Prompts = key(32, "prompts of a rollout")
    samples_per_prompt: Annotated[int, Unit("samples")] = key(8, "samples of each prompt, its group", ge=2)
    updates_per_rollout: Count = key(1, "optimiser steps on the samples of a rollout, each on a part")
    temperature: Number = key(1.0, "temperature of the distribution that is sampled, and learnt", gt=0)
    top_p: Number = key(1.0, "of what is sampled: the fewest likeliest tokens of this probability", gt=0, le=1)
    top_k: Whole = key(0, "of what is sampled: so many likeliest tokens; 0: all", ge=0)
    min_p: Number = key(0.0, "of what is sampled: no token below this share of the likeliest one's", ge=0, lt=1)
    max_new_tokens: Tokens = key(128, "longest completion of a sample")
    optimizer: OptimizerSection = Field(description="what turns gradients into updates")
    loss: LossSection = key(LossSection(), "beside the algorithm's own formula")
    teacher: TeacherSection | None = key(None, "what `opd` learns from")
    drift_budget: Nats = key(
        0.05, "mismatch that a run may drift to; an alarm tells when the trend passes it before the end"
    )
    rollout_format: str = key("w8a8", "format of the weights that generate, a file in isthmus/formats")
    staleness: Annotated[int, Unit("versions")] = key(
        0, "versions by which samples may lag behind the trainer; from 1 on they are generated while it learns", ge=0
    )
    update_while_writing: bool = key(
        False, "new weights reach samples that are being written; else they wait until the engine is idle"
    )
    update: Literal["delta", "full"] = key("delta", "what crosses at a step: changes, or all weights")
    snapshot_every: Versions = key(32, "versions after which all weights are sent again")
    publish: Path | None = key(None, "a folder for `isthmus follow` that receives every version")
    publish_layout: Literal["isthmus", "shared"] = key(
        "isthmus",
        "of that folder: what `isthmus follow` reads, or `weight_v000123/`, which SGLang, slime and miles read",
    )
    parity_tokens: Annotated[int, Unit("tokens")] = key(
        8, "tokens of each of two prompts that check an engine's new weights; 0: no check", ge=0
    )
    parity_every: Versions = key(1, "versions between two such checks")
    parity_strikes: Count = key(2, "failed checks in a row after which the stage is refused")
    checkpoint_every: Steps = key(10, "steps between two checkpoints")
    keep_checkpoints: Count = key(2, "newest checkpoints that are kept")
    heldout_problems: Problems = key(500, "held-out problems that measure the accuracy")
    heldout_samples: Annotated[Positive, Unit("samples")] = key(1, "answers to each; pass@k is told up to this k")
    evaluate_every: Steps | None = key(None, "steps between two such measures; before and after alone if absent")

    @property
    def cuts(self) -> bool:
        """Whether tokens are left out of what is sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @model_validator(mode="after")
    def _masks_go_with_cuts(self) -> Self:
        keeps = self.loss.keep_sampling_mask
        if self.cuts and not keeps:
            raise ValueError(
                "top_p, top_k and min_p leave tokens out, and the learner's log-probabilities must be of the "
                "distribution that was sampled: set loss.keep_sampling_mask = true, or leave the three out"
            )
        if keeps and not self.cuts:
            raise ValueError("loss.keep_sampling_mask keeps what top_p, top_k or min_p left: set one of them")
        if keeps and self.teacher is not None and self.teacher.url is not None:
            raise ValueError(
                "a server scores all tokens, and loss.keep_sampling_mask wants those of each draw alone: take a step "
                "as teacher, or sample without top_p, top_k and min_p"
            )
        return self

    @model_validator(mode="after")
    def _ahead_or_not(self) -> Self:
        if self.update_while_writing and not self.staleness:
            raise ValueError("update_while_writing is for samples that are written ahead: set staleness to 1 or more")
        return self


class SampleSection(StepSection):
    """Answers of the model that it starts from, filtered, as data for a later step."""

    kind: Literal["sample"] = Field(description="what the step does")
    tasks: Mix = key({}, "tasks whose training prompts it answers, by weight; all tasks if absent")
    prompts: Prompts = key(1000, "prompts that are answered, at most those that the tasks have")
    samples_per_prompt: Annotated[Positive, Unit("samples")] = key(4, "answers to each prompt")
    temperature: Number = key(1.0, "temperature of the distribution that is sampled", gt=0)
    max_new_tokens: Tokens = key(128, "longest answer")
    keep: list[str] = key(["correct"], "filters that an answer has to pass, in order; docs/training.md lists them")
    longest: Tokens | None = key(None, "of the filter not-longer-than: tokens of an answer")
    per_prompt: Annotated[Positive, Unit("samples")] | None = key(None, "answers kept of a prompt, at most")
    rollout_format: str = key("w8a8", "format of the weights that generate, a file in isthmus/formats")
    prompts_per_batch: Prompts = key(64, "prompts that are answered and stored together")


Step = Annotated[
    Annotated[PretrainSection, Tag("pretrain")]
    | Annotated[SftSection, Tag("sft")]
    | Annotated[RlSection, Tag("rl")]
    | Annotated[SampleSection, Tag("sample")],
    Discriminator("kind"),
]
STEP_KINDS = ("pretrain", "sft", "rl", "sample")
MODEL = "model"
"""What `from` says for the weights that a model starts with."""
RESERVED = ("qualify", "plan", "handoff", "report", "serve", "run", MODEL)
"""Names that no step has: they are others' in the run folder, in events and on the command line."""
