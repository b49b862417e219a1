"""The recipe: a strict TOML file that says everything a run does.

An unknown key is an error with a suggestion. The resolved recipe (presets merged, overrides applied, defaults
filled in) has one hash, and it is the first file of every run folder.
"""

from __future__ import annotations

import hashlib
import json
import typing
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from isthmus.recipe import lineage
from isthmus.recipe.architecture import Architecture, MixtureSection, ModelSection
from isthmus.recipe.cluster import ClusterSection, RaySection
from isthmus.recipe.drill import DrillSection
from isthmus.recipe.section import (
    Count,
    Nats,
    Number,
    Positive,
    Seconds,
    Section,
    Share,
    Tokens,
    Unit,
    Whole,
    key,
)
from isthmus.recipe.steps import MODEL, Mix, Problems, Prompts, Rows, Step, StepSection
from isthmus.recipe.supervise import SuperviseSection

Mebibytes = Annotated[Positive, Unit("MiB")]
Price = Annotated[float, Field(ge=0.0), Unit("money/chip-h")]
Thinking = Literal["auto", "always", "never"]
PlacedStage = Literal["train", "rollout", "serve"]


class PoolSection(Section):
    """A number of chips of one kind. `rehearsed` enforces the rules of a chip that is not here on the CPU.

    `engines` are elsewhere, and someone else started them.
    """

    chip: str = Field(description="the kind of chip; `isthmus chips` lists them")
    count: Count = key(1, "chips")
    ranks: Count | None = key(None, "training processes; one per chip if absent")
    rehearsed: bool = key(False, "the chip is not here: its rules are enforced on the CPU")
    threads: Count | None = key(None, "compute threads of a process on a CPU; chosen if absent")
    faults: list[str] = key([], "faults that a rehearsal plants, such as `hang@rank=1,step=3`")
    engines: list[str] = key([], "URLs of engines that run elsewhere, such as `http://10.0.0.7:8000`; they generate")
    api_key_file: Path | None = key(None, "a file with the key that these engines want; one that may change weights")
    exchange: Path | None = key(
        None, "a folder that these engines and this machine see under the same path; engines of other makes need it"
    )
    ray: RaySection | None = key(None, "it stands on nodes of the Ray cluster of [cluster]; on this machine if absent")

    @model_validator(mode="after")
    def _nodes_are_neither_here_nor_started_by_others(self) -> Self:
        for name, given in (("rehearsed = true", self.rehearsed), ("engines = [...]", bool(self.engines))):
            if self.ray is not None and given:
                raise ValueError(
                    f"ray = {{...}} has processes started on nodes of a cluster, and {name} says otherwise; keep one"
                )
        return self

    @model_validator(mode="after")
    def _faults_only_in_a_rehearsal(self) -> Self:
        if self.faults and not self.rehearsed:
            raise ValueError("faults are planted in a rehearsed pool alone; write rehearsed = true, or leave them out")
        return self

    @model_validator(mode="after")
    def _engines_are_elsewhere(self) -> Self:
        if not self.engines:
            given = [name for name in ("api_key_file", "exchange") if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"{given[0]} is for engines that run elsewhere; write engines = [URL, ...], or leave it"
                )
            return self
        if self.rehearsed:
            raise ValueError("a rehearsal is here, and engines = [...] are elsewhere; keep one of the two")
        if self.ranks is not None:
            raise ValueError("ranks train, and a pool of engines = [...] generates; leave ranks out")
        for number, url in enumerate(self.engines):
            if problem := _url_problem(url):
                raise ValueError(f"engines[{number}] {problem}")
        if len({url.rstrip("/") for url in self.engines}) < len(self.engines):
            raise ValueError("an engine stands twice in engines; each URL is one engine")
        return self


def _url_problem(url: str) -> str | None:
    """What is wrong with the URL of an engine, which is not repeated where it may hold a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is no URL ({error}); write http://host:port" if "@" not in url else _NO_SECRET
    if "@" in url:
        return _NO_SECRET
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return f"{url!r} is not the URL of an engine; write http://host:port"
    if "?" in url or "#" in url:
        return f"{url!r} has a query or a fragment, and paths of the API are put behind it; write http://host:port"
    if not (url.isascii() and url.isprintable()) or " " in url:
        return f"{url!r} has signs that no URL has; write http://host:port"
    return None


_NO_SECRET = (
    "has a user name or a password, which would stand in events and records; write http://host:port, and the key "
    "into a file that api_key_file names"
)


class PlaceSection(Section):
    """Pools in order of preference for each placed stage."""

    train: list[str] = Field(min_length=1, description="pools for pretraining, supervised tuning and the learner of RL")
    rollout: list[str] = Field(min_length=1, description="pools for the engine that generates the samples of RL")
    serve: list[str] = Field(min_length=1, description="pools for the bundle that the hand-off makes")


class TrainSection(Section):
    """How training computes, whatever it trains on.

    The pool's chips divide into `replicate` groups that hold the whole model each; within a group the parameters are
    sharded, and the routed experts are spread over `expert` chips that exchange tokens.
    """

    precision: Literal["fp32", "bf16"] | None = key(
        None, "of forward and backward; the master weights are fp32. bf16 if absent, fp32 on a CPU"
    )
    rows_per_microbatch: Rows | None = key(None, "packed rows that a chip computes at once; all of its rows if absent")
    activation_checkpointing: bool = key(False, "compute layers again in the backward pass")
    compile: bool = key(False, "torch.compile norms, projections, MLPs and routers")
    replicate: Count = key(1, "groups of ranks that hold the whole model each")
    expert: Count = key(1, "ranks over which the routed experts of a layer are spread")
    tensorboard: bool = key(False, "write the curves for TensorBoard as well, into the run folder")

    def precision_on(self, device: str) -> Literal["fp32", "bf16"]:
        """What is chosen on a torch device type."""
        return self.precision or ("fp32" if device == "cpu" else "bf16")


class HandoffSection(Section):
    """The gate between the trained weights and the bundle that is served; docs/crossing.md tells how it judges."""

    step: str | None = key(None, "the step whose weights cross; the last one that trains [model] if absent")
    format: str = key("w8a8", "format of the bundle that is served, a file in isthmus/formats")
    export: Literal["bf16", "bf16-stochastic", "fp32"] = key(
        "bf16",
        "of the plain bundle: rounded to the nearest; at random, which keeps small updates on average; or fp32 masters",
    )
    balance: bool = key(False, "move the range of outlier channels into the weights before int8")
    rounding: Literal["nearest", "gptq"] = key(
        "nearest", "of int8 weights; gptq makes up for an error in the weights that follow"
    )
    calibration_prompts: Prompts = key(64, "training prompts whose answers calibrate a format")
    capture_mb: Mebibytes = key(
        256, "size of golden inputs and outputs, at most, below 64 MB and 5 % of the weights; 8 tokens are always kept"
    )
    golden_prompts: Prompts = key(
        64, "held-out problems whose answers are compared token by token, heldout_problems at most"
    )
    heldout_problems: Problems = key(500, "held-out problems that reference and target answer")
    max_new_tokens: Tokens | None = key(None, "longest answer to them; as the last RL has it, else 256, if absent")
    temperature: Number | None = key(None, "of these answers; as the last RL has it, else 1, if absent", gt=0)
    max_mean_kl: Nats = key(0.02, "limit on the mean KL of the format, and of the target, against the fp32 reference")
    max_chip_kl: Nats = key(
        0.01, "what target and engine may be further from the trained model than the exact emulator of the format is"
    )
    min_top1_agreement: Share = key(0.95, "share of tokens with the reference's first choice")
    max_accuracy_drop: Share = key(0.05, "non-inferiority margin on the held-out task", gt=0)
    confidence: Number = key(0.95, "confidence of the intervals that are held against limits", gt=0.5, lt=1.0)
    sign_key: Path | None = key(None, "private Ed25519 key that signs the seal; unsigned if absent")


class EngineOptions(Section):
    """How the local engine works on a bundle, whatever the bundle is."""

    block_size: Tokens = key(16, "tokens per block of the cache")
    cache_tokens: Tokens | None = key(
        None, "tokens in the cache; if absent, enough for max_batch sequences of full length, within 2 GiB"
    )
    chunk_tokens: Tokens = key(512, "tokens of one pass")
    prefix_cache: bool = key(
        True, "prompts that begin alike share what was computed; off: each is computed from its beginning"
    )
    speculate: bool = key(False, "draft tokens by multi-token prediction; the answers stay the same")
    batch_invariant: bool = key(False, "the same bits in any company, and slower")
    record_routes: bool = key(False, "note the experts of every token, for requests that ask for them")


class ServeSection(EngineOptions):
    """The API server and its chat page; docs/serving.md tells how to run them."""

    host: str = key("127.0.0.1", "address to listen on")
    port: Whole = key(8000, "port to listen on; 0: a free one", ge=0, le=65535)
    max_batch: Annotated[Positive, Unit("samples")] = key(32, "samples that run at the same time")
    served_model_name: list[str] = key([], "names of the model in the API; its own if absent")
    max_new_tokens: Tokens | None = key(
        None, "longest answer where a request does not say; the rest of the context if absent"
    )
    temperature: Number = key(0.6, "temperature where a request does not say; 0: the likeliest token", ge=0)
    thinking: Thinking = key(
        "auto", "auto: as the chat template has it; always: open it where the template does not; never: close it"
    )
    key_file: Path | None = key(None, "API keys, a line `name key` each; $ISTHMUS_API_KEYS has more")
    allow_open: bool = key(False, "listen beyond this machine without user keys")
    allow_origins: list[str] = key([], "origins whose pages may ask from a browser, or `*`")
    allowed_hosts: list[str] = key([], "names that a server without user keys answers to, beside its addresses")
    allow_unsealed: bool = key(False, "serve what no seal vouches for, and say so everywhere")
    trusted_keys: Path | None = key(None, "public keys, one of which must have signed the seal")
    max_waiting: Annotated[Positive, Unit("samples")] = key(4096, "samples in the line; more are refused")
    max_waiting_tokens: Tokens | None = key(None, "tokens of prompts in the line; no limit if absent")
    requests_per_minute: Annotated[Positive, Unit("requests/min")] | None = key(
        None, "requests of each key; no limit if absent"
    )
    tokens_per_minute: Annotated[Positive, Unit("tokens/min")] | None = key(
        None, "prompt and completion tokens of each key; no limit if absent"
    )
    concurrent_requests: Annotated[Positive, Unit("requests")] | None = key(
        None, "unanswered requests of each key; no limit if absent"
    )
    drain_seconds: Seconds = key(30.0, "time that running requests get after SIGTERM or Ctrl-C", ge=0)
    access_log: str | None = key(
        None, "a file, stdout, stderr or none; in the run folder if absent, none for a bundle without a run"
    )
    access_log_mib: Mebibytes = key(64, "size at which the access log is rotated")
    log_prompts: bool = key(False, "write prompts and answers into the access log")
    canary_minutes: Annotated[float, Unit("min")] = key(
        15.0, "time between two canaries; 0: only when the administrator asks for one", ge=0
    )
    canary_bound: Annotated[float, Unit("nats")] = key(0.1, "how far a log-probability may drift", gt=0)
    on_drift: Literal["alarm", "rollback"] = key(
        "alarm", "what a canary that drifts leads to; rollback also goes back to the sealed bundle"
    )


class EvaluationSection(Section):
    """Held-out problems that are answered at the end of steps, the same for all of them, so that steps compare."""

    after: list[str] = key([], "steps after which they are answered; RL also answers its own before and after itself")
    tasks: Mix = key({}, "tasks whose held-out problems are asked; all tasks if absent")
    problems: Problems = key(500, "held-out problems, of all tasks together")
    samples: Annotated[Positive, Unit("samples")] = key(1, "answers to each; pass@k is told up to this k")
    temperature: Number = key(1.0, "temperature of the answers", gt=0)
    max_new_tokens: Tokens = key(256, "longest answer")
    format: str = key("w8a8", "format of the weights that answer, a file in isthmus/formats")
    compare: list[tuple[str, str]] = key([], "pairs of these steps; the dossier says whether the second is better")


class QualifySection(Section):
    """How much a qualification measures."""

    matmul_size: Count = key(512, "rows and columns of a timed product; more on accelerators")
    memory_mib: Mebibytes = key(64, "size of a timed copy; more on accelerators")
    repeats: Whole = key(10, "times that an operation is timed", ge=3)
    pilot_steps: Annotated[int, Unit("steps")] = key(4, "timed steps of training this model", ge=2)
    confidence: Number = key(0.95, "confidence of intervals, and of bounds on what never failed", gt=0.5, lt=1.0)
    budget: str | None = key(None, "time for the probes of a pool, such as 30s; no limit if absent")
    soak_s: Seconds = key(12.0, "time of real training steps in the soak", gt=0)
    thresholds: Path | None = key(None, "a CSV of floors and ceilings beside the package's")
    stall_s: Seconds = key(20.0, "time without a sign of life after which a rank hangs", gt=0)


class RulesSection(Section):
    """Who buys the chips and where they stand: `plan` then asks the dated records of `isthmus rules`, as of that day.

    Without this section no rule is looked at, and the plan says so.
    """

    as_of: date = Field(description="day of the records that count")
    buyer_parent: str = Field(description="country of the buyer's ultimate parent, two letters such as CN")
    site: str = Field(description="country in which the pools stand, two letters")
    sites: dict[str, str] = key({}, "countries of pools that stand elsewhere, by the pool's name")
    state_funded: bool | None = key(None, "whether the data centre has state money; not known if absent")
    licences: dict[str, str] = key({}, "licences that the buyer holds, by the pool's name; they are not checked")


class AimSection(Section):
    """What `plan` chooses pools by.

    The pools of training and of rollouts are chosen as a pair, among those that may. Without this section the order of
    [place] decides alone. Times and costs are those of the forecast; what it does not know, and what was only
    rehearsed, is never chosen for its time or cost. Serving keeps to the order.
    """

    choose: Literal["order", "time", "cost"] = key("order", "first in the order, soonest done, or cheapest, at P50")
    prices: dict[str, Price] = key({}, "of a chip-hour, by the pool's name; none is assumed")
    currency: str = key("USD", "of the prices")
    least: dict[str, Share] = key({}, "least share of the chip-hours of all steps, by the vendor of the chips, at P50")
    max_hours: Annotated[float, Unit("h")] | None = key(None, "time that all steps may take, at P90", gt=0)
    max_cost: Number | None = key(None, "money that all steps may cost, at P90", gt=0)


class Recipe(Section):
    """A whole recipe, resolved: presets merged and defaults filled in."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$", description="name of the run; its folder is runs/NAME if none is given"
    )
    seed: Whole = key(0, "seed of every random choice", ge=0)
    model: Architecture = Field(description="the architecture")
    pools: dict[str, PoolSection] = Field(min_length=1, description="what there is to compute on, by name")
    place: PlaceSection = Field(description="which pools do what")
    models: dict[str, Architecture] = key({}, "further models, which steps name")
    tasks: dict[str, dict[str, Any]] = key(
        {"countdown": {}},
        "what is learnt, by name: `kind`, a file in isthmus/tasks or the name, and options",
    )
    rewards: dict[str, dict[str, Any]] = key({}, "options of rewards, by name; `kind` if it is not the name")
    qualify: QualifySection = key(QualifySection(), "how much a qualification measures")
    train: TrainSection = key(TrainSection(), "how training computes")
    step: list[Step] = Field(min_length=1, description="what is trained, in this order")
    supervise: SuperviseSection = key(SuperviseSection(), "what is done when training goes wrong")
    evaluation: EvaluationSection = key(EvaluationSection(), "what steps are compared by")
    handoff: HandoffSection = key(HandoffSection(), "the gate")
    serve: ServeSection = key(ServeSection(), "the server")
    rules: RulesSection | None = key(None, "who buys and where; no rule is looked at if absent")
    drill: DrillSection | None = key(None, "makes it a drill, for `isthmus drill`; it is none if absent")
    aim: AimSection | None = key(None, "by what pools are chosen; by the order of [place] if absent")
    cluster: ClusterSection | None = key(None, "the Ray cluster that has the nodes of pools with `ray`")

    @model_validator(mode="after")
    def _nodes_are_of_a_cluster(self) -> Self:
        on_nodes = [name for name, pool in self.pools.items() if pool.ray is not None]
        if on_nodes and self.cluster is None:
            raise ValueError(
                f'pools.{on_nodes[0]}.ray names nodes, and the recipe no cluster; write [cluster] address = "auto"'
            )
        if self.cluster is not None and not on_nodes:
            raise ValueError("[cluster] is for pools on its nodes, and none is: write pools.NAME.ray, or leave it out")
        return self

    @model_validator(mode="after")
    def _prices_name_pools(self) -> Self:
        for pool in self.aim.prices if self.aim else ():
            if pool not in self.pools:
                raise ValueError(f"aim.prices names the pool {pool!r}; the recipe has {', '.join(self.pools)}")
        return self

    @model_validator(mode="after")
    def _rules_name_pools(self) -> Self:
        for where in ("sites", "licences"):
            for pool in getattr(self.rules, where, {}):
                if pool not in self.pools:
                    raise ValueError(f"rules.{where} names the pool {pool!r}; the recipe has {', '.join(self.pools)}")
        return self

    @model_validator(mode="after")
    def _places_name_pools(self) -> Self:
        for stage in typing.get_args(PlacedStage):
            for pool in getattr(self.place, stage):
                if pool not in self.pools:
                    raise ValueError(f"place.{stage} names the pool {pool!r}; the recipe has {', '.join(self.pools)}")
        return self

    @model_validator(mode="after")
    def _engines_only_generate(self) -> Self:
        for stage, what in (("train", "trains"), ("serve", "is handed the bundle")):
            for pool in getattr(self.place, stage):
                if self.pools[pool].engines:
                    raise ValueError(
                        f"place.{stage} names {pool!r}, which is reached by engines = [...]: such a pool generates, "
                        f"and none of its chips {what}; name it in place.rollout alone"
                    )
        return self

    @model_validator(mode="after")
    def _ranks_divide(self) -> Self:
        for name in self.place.train:
            pool = self.pools[name]
            if not pool.rehearsed and (problem := layout_problem(self.model, self.train, pool.ranks or pool.count)):
                raise ValueError(f"pool {name!r}: {problem}")
        return self

    @model_validator(mode="after")
    def _steps_hang_together(self) -> Self:
        asked = self.evaluation
        if problem := lineage.problem(self.step, self.tasks, self.models, self.handoff.step) or lineage.asked_problem(
            self.step, self.tasks, asked.after, asked.tasks, asked.compare
        ):
            raise ValueError(problem)
        return self

    def named(self, name: str) -> Step:
        """The step of that name; raises KeyError."""
        return {one.name: one for one in self.step}[name]

    def start_of(self, step: StepSection) -> str:
        """The name of the step whose weights a step starts from, or MODEL."""
        return step.from_ or MODEL

    def architecture_of(self, step: StepSection) -> Architecture:
        """What a step trains: [model], or the further model that the first step of its line names."""
        name = lineage.line(self.step, step.name)[0].model
        return self.model if name is None else self.models[name]

    @property
    def handed_off(self) -> Step:
        """The step whose weights cross in the hand-off."""
        last = self.handoff.step or lineage.last_of_model(self.step)
        assert last is not None
        return self.named(last)

    @property
    def unused_steps(self) -> list[str]:
        """In words, each step of which nothing comes."""
        compared = [name for pair in self.evaluation.compare for name in pair]
        return lineage.unused_steps(self.step, self.handed_off.name, compared)

    def canonical(self) -> str:
        """The resolved recipe as JSON with sorted keys: the text that is hashed and stored."""
        return _canonical(self.model_dump(mode="json", by_alias=True))

    def digest(self) -> str:
        """SHA-256 of `canonical()`, hexadecimal."""
        return content_digest(self.model_dump(mode="json", by_alias=True))


def content_digest(content: Any) -> str:
    """SHA-256 of JSON with sorted keys, hexadecimal: of a recipe's, what `Recipe.digest` gives."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, indent=2)


def layout_problem(model: ModelSection, train: TrainSection, ranks: int) -> str | None:
    """Why `ranks` processes cannot divide a model as [train] says, or None if they can."""
    product = train.replicate * train.expert
    if ranks % product:
        fitting = " or ".join(str(one) for one in (ranks // product * product, -(-ranks // product) * product) if one)
        return (
            f"training on {ranks} rank{'s' * (ranks > 1)} with train.replicate = {train.replicate} and train.expert = "
            f"{train.expert}: their product must divide the number of ranks, as it does {fitting}"
        )
    if not isinstance(model, MixtureSection):
        return f"train.expert = {train.expert}, but a dense model has no experts" if train.expert > 1 else None
    if model.n_routed_experts % train.expert:
        return f"train.expert = {train.expert} does not divide the {model.n_routed_experts} routed experts"
    sharing = ranks // train.replicate
    if sharing > model.n_routed_experts:
        least = next(
            n
            for n in range(train.replicate, ranks + 1)
            if ranks % (n * train.expert) == 0 and ranks // n <= model.n_routed_experts
        )
        return (
            f"{sharing} ranks share the {model.n_routed_experts} routed experts, which are held whole: some ranks "
            f"would hold none; train.replicate = {least} is the least that {ranks} ranks need"
        )
    return None
