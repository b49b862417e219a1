"""Tasksets that are not for single answers, chosen by `what`."""

import verifiers.v1 as vf
from adder import AdderData, AdderTask


class Prepared(AdderTask):
    async def setup(self, trace, runtime):
        return None


class Tooled(AdderTask):
    @classmethod
    def toolsets(cls, config):
        return ["calculator"]


class Inspected(AdderTask):
    @vf.reward(weight=1.0)
    async def files(self, trace, runtime) -> float:
        return 1.0


class Stopped(AdderTask):
    def ends(self, trace) -> bool:
        return True

    ends.stop = True


class MachinistConfig(vf.TasksetConfig):
    what: str


class Machinist(vf.Taskset):
    Config = MachinistConfig

    def load(self):
        kinds = {"prepared": Prepared, "tooled": Tooled, "inspected": Inspected, "stopped": Stopped}
        prompt = None if self.config.what == "opened" else "1 + 1 = ?"
        yield kinds.get(self.config.what, AdderTask)(AdderData(prompt=prompt, answer="2"), self.config.task)


__all__ = ["Machinist"]
