"""A server that answers as vLLM 0.32 with our plug-in does: the plug-in is the real one, in a model of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from isthmus.engines.vllm_plugin.layout import Unusable
from isthmus.engines.vllm_plugin.standing import Standing
from isthmus.engines.vllm_plugin.transplant import Misfit
from isthmus.formats.files.bundle import read_bundle
from tests.support.other_servers import Answer, FakeVllm


class OurMake:
    """The model of a bundle, filled tensor by tensor."""

    def __init__(self, bundle: Path):
        self.bundle = bundle

    def build(self):
        model = read_bundle(self.bundle).build()
        for tensor in model.state_dict().values():
            tensor.zero_()
        return model

    def load(self, model, tensors) -> None:
        places = model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors:
                places[name].copy_(tensor)

    def finish(self, model) -> None:
        pass


class FakePlugged(FakeVllm):
    """`active` is vLLM's own session of an update; `spoil`, if set, gets the model after each switch."""

    def __init__(self, bundle: Path, **options: Any):
        super().__init__(bundle, **options)
        self.standing = Standing(self.model, OurMake(bundle), graphs=False)
        self.active, self.spoil = False, None
        self.sources: list[str] = []

    def control(self, path: str, query: dict[str, str], ask: dict[str, Any]) -> Any:
        if path == "/server_info":
            assert query == {"config_format": "json"}
            config = {"weight_transfer_config": {"backend": "isthmus"}, "model_config": {"dtype": "torch.float32"}}
            return {"vllm_config": config}
        if path == "/collective_rpc" and ask["method"] == "isthmus_weights":
            report = ask["kwargs"]["ask"] == "report"
            return {"results": [self.standing.report() | {"drafts": False} if report else self.standing.state()]}
        if path == "/start_weight_update":
            if self.active:
                raise failed("start_weight_update called while a weight update is already active.")
            self.active = True
            self.standing.drop()
            return {"message": "Weight update started"}
        if path == "/update_weights":
            return self.update(ask["update_info"])
        if path == "/finish_weight_update":
            return self.finish(ask["weight_version"])
        return super().control(path, query, ask)

    def update(self, info: dict[str, Any]) -> Any:
        if not self.active:
            raise failed("start_weight_update must be called before update_weights.")
        if info.get("abort"):
            self.active = False
            self.standing.drop()
            raise failed("the update was given up, as was asked for")
        self.sources.append(info["source"])
        self.standing.stage(info["source"])
        return {"message": "Weights updated"}

    def finish(self, version: str) -> Any:
        assert self.paused and self.active
        try:
            self.standing.switch()
        except (Unusable, Misfit) as error:
            raise failed(str(error)) from error
        self.active, self.version = False, version
        if self.spoil is not None:
            with torch.no_grad():
                self.spoil(self.model)
        return {"message": "Weight update finished"}


def failed(why: str) -> Answer:
    message = f"Call to collective_rpc method failed: Worker failed with error '{why}'"
    return Answer(500, {"error": {"message": message, "code": 500}})
