"""A taskset of single answers, with two rewards."""

import verifiers.v1 as vf


class AdderData(vf.TaskData):
    answer: str


class AdderTask(vf.Task):
    @vf.reward(weight=0.75)
    async def right(self, trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.25)
    async def short(self, task, trace) -> float:
        return float(len(trace.last_reply) < 5)


class AdderConfig(vf.TasksetConfig):
    largest: int = 5


class Adder(vf.Taskset):
    Config = AdderConfig

    def load(self):
        for a in range(self.config.largest):
            for b in range(self.config.largest):
                asked = AdderData(prompt=f"{a} + {b} = ?", system_prompt="Add.", answer=str(a + b))
                yield AdderTask(asked, self.config.task)


__all__ = ["Adder"]
