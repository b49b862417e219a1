"""What a taskset package uses of `verifiers.v1`, by its API, for an environment without the library."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class TaskData(BaseModel):
    model_config = ConfigDict(frozen=True)
    idx: int | None = None
    name: str | None = None
    prompt: str | list[Any] | None = None
    system_prompt: str | None = None
    image: str | None = None
    skills: list[str] = []


class TaskConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TasksetConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str = ""
    task: TaskConfig = TaskConfig()


def reward(weight: float = 1.0):
    def mark(function):
        function.reward, function._vf_weight = True, weight
        return function

    return mark


class Reward(BaseModel):
    score: float
    weight: float

    @property
    def value(self) -> float:
        return self.score * self.weight


class Task:
    NEEDS_CONTAINER: ClassVar[bool] = False
    key = hash = "same"

    def __init__(self, data, config=None):
        self.data, self.config = data, config or TaskConfig()

    def with_data(self, **update):
        clone = copy.copy(self)
        clone.data = self.data.model_copy(update=update)
        return clone

    async def setup(self, trace, runtime):
        return None

    async def finalize(self, trace, runtime):
        return None

    def plugged_judges(self):
        return []

    def hooks(self, attr: str):
        names = {name for kind in type(self).__mro__ for name, value in vars(kind).items() if hasattr(value, attr)}
        return [getattr(self, name) for name in sorted(names)]

    @classmethod
    def toolsets(cls, config):
        return []

    async def score(self, trace, runtime=None):
        available = {"task": self.data, "trace": trace}
        for one in self.hooks("reward"):
            wanted = {name: available[name] for name in inspect.signature(one).parameters}
            trace.rewards[one.__name__] = Reward(score=await one(**wanted), weight=one._vf_weight)


class Taskset:
    Config: type[TasksetConfig] = TasksetConfig

    def __init__(self, config):
        self.config = config

    def take(self, count: int):
        return (task.with_data(idx=index) for index, task in enumerate(itertools.islice(self.load(), count)))

    @classmethod
    def toolsets(cls, config):
        return []


class MessageNode(BaseModel):
    parent: int | None
    message: dict[str, Any]
    sampled: bool


class TraceTask(BaseModel):
    type: str
    data: Any
    key: str
    hash: str


class AgentConfig(BaseModel):
    pass


class AgentInfo(BaseModel):
    config: AgentConfig


class Trace(BaseModel):
    task: TraceTask
    agent: AgentInfo
    nodes: list[MessageNode]
    is_completed: bool
    ok: bool
    rewards: dict[str, Reward | None] = Field(default_factory=dict)

    @property
    def last_reply(self) -> str:
        return [node.message["content"] for node in self.nodes if node.sampled][-1]


class Env:
    pass


class SingleAgentEnv(Env):
    pass


def _exported(taskset: str, base: type) -> Any:
    module = importlib.import_module(taskset)
    found = [one for name in module.__all__ if issubclass(one := getattr(module, name), base)]
    return found[0] if found else None


def environment_class(taskset: str) -> type[Env]:
    return _exported(taskset, Env) or SingleAgentEnv


def taskset_config_type(taskset: str) -> type[TasksetConfig]:
    return _exported(taskset, Taskset).Config


def load_taskset(config):
    return _exported(config.id, Taskset)(config)
