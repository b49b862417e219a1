"""A taskset package of verifiers: its tasks as problems, and its own rewards. Called in a worker process.

A taskset is taken if a single answer is all that it asks for; `refusal` says why another is not.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from functools import cache
from typing import Any

vf: Any = importlib.import_module("verifiers.v1")


def problems(taskset: str, options: str, count: int) -> dict[str, Any]:
    """`refused` with the reason, or `problems`: for each its `messages`, and its `name`."""
    loaded = _loaded(taskset, options, count)
    if reason := refusal(taskset, options, count):
        return {"refused": reason}
    return {"problems": [{"name": task.data.name, "messages": _messages(task)} for task in loaded]}


def score(taskset: str, options: str, count: int, index: int, completion: str) -> float | None:
    """The sum of the task's rewards by their weights; None if it has given none."""
    task = _loaded(taskset, options, count)[index]
    seen = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    asked = [*_messages(task), {"role": "assistant", "content": completion}]
    last = len(asked) - 1
    nodes = [
        vf.MessageNode(parent=number - 1 if number else None, message=message, sampled=number == last)
        for number, message in enumerate(asked)
    ]
    trace = vf.Trace(task=seen, agent=vf.AgentInfo(config=vf.AgentConfig()), nodes=nodes, is_completed=True, ok=True)
    asyncio.run(task.score(trace))
    given = [reward for reward in trace.rewards.values() if reward is not None]
    return float(sum(reward.value for reward in given)) if given else None


def refusal(taskset: str, options: str, count: int) -> str | None:
    """Why a taskset is not for single answers, if it is not."""
    loaded = _loaded(taskset, options, count)
    if not loaded:
        return "it has no tasks"
    environment = vf.environment_class(taskset)
    if environment is not vf.SingleAgentEnv:
        return f"it has an environment of its own, {environment.__name__}, with several turns or models"
    shared = type(_taskset(taskset, options)).toolsets(_config(taskset, options))
    if shared or type(loaded[0]).toolsets(loaded[0].config):
        return "it gives the model tools"
    return next((reason for task in loaded if (reason := _task_refusal(task))), None)


def _task_refusal(task: Any) -> str | None:
    kind, data = type(task), task.data
    if kind.NEEDS_CONTAINER or data.image is not None or data.skills:
        return "its tasks run in a container"
    if kind.setup is not vf.Task.setup or kind.finalize is not vf.Task.finalize:
        return "its tasks prepare a machine"
    if not data.prompt:
        return "the user opens the conversation, which has several turns"
    if task.hooks("stop"):
        return "its conversations have several turns, and a rule that ends them"
    rewards = [*task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    if not rewards:
        return "its tasks have no reward"
    needy = [one.__name__ for one in rewards if _needs_runtime(one)]
    return f"its reward {needy[0]} looks into a machine" if needy else None


def _needs_runtime(reward: Any) -> bool:
    parameter = inspect.signature(reward).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _messages(task: Any) -> list[dict[str, Any]]:
    data = task.data
    said = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        return [*said, {"role": "user", "content": data.prompt}]
    return [*said, *(message.model_dump(exclude_none=True) for message in data.prompt)]


@cache
def _loaded(taskset: str, options: str, count: int) -> list[Any]:
    return list(_taskset(taskset, options).take(count))


@cache
def _taskset(taskset: str, options: str) -> Any:
    return vf.load_taskset(_config(taskset, options))


@cache
def _config(taskset: str, options: str) -> Any:
    return vf.taskset_config_type(taskset).model_validate_json(options)
