"""The engine that vLLM makes for `--weight-transfer-config '{"backend": "isthmus"}'`. Read in vLLM 0.32.

    POST /start_weight_update
    POST /update_weights          {"update_info": {"source": FOLDER or URL of a weight_v000007/}}; answers at once
    POST /collective_rpc          {"method": "isthmus_weights", "kwargs": {"ask": "state"}} until it is ready
    POST /pause?mode=keep
    POST /finish_weight_update    {"weight_version": "7"}
    POST /reset_prefix_cache?reset_running_requests=true
    POST /resume

`{"update_info": {"abort": true}}` gives up what was staged, and ends vLLM's own session by an error. A model is built
beside the one that serves, filled by vLLM's own loaders and finished as at a start, and takes its place; so an update
needs the memory of the weights once more while it switches, on the device, and on the host that of the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.config.compilation import CompilationMode, CUDAGraphMode  # pyright: ignore[reportMissingImports]
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.utils import (  # pyright: ignore[reportMissingImports]
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype  # pyright: ignore[reportMissingImports]

from .standing import Standing


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Where a version lies, or that the update is given up."""

    source: str = ""
    abort: bool = False


class GivenUp(Exception):
    """Ends vLLM's session of an update that is given up."""


class VllmMake:
    """How vLLM makes the model of its configuration, beside the one that it has."""

    def __init__(self, vllm_config: Any, device: torch.device):
        self.vllm_config, self.device = vllm_config, device

    def build(self) -> nn.Module:
        """Layers register themselves by name with the configuration, so this one has a register of its own."""
        own = copy.copy(self.vllm_config)
        own.compilation_config = copy.copy(own.compilation_config)
        own.compilation_config.static_forward_context = {}
        own.compilation_config.static_all_moe_layers = []
        own.compilation_config.mode = CompilationMode.NONE
        with set_default_torch_dtype(own.model_config.dtype), self.device:
            return initialize_model(own, model_config=own.model_config).eval()

    def load(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        with set_default_torch_dtype(self.vllm_config.model_config.dtype), self.device:
            model.load_weights(tensors)  # pyright: ignore[reportCallIssue]

    def finish(self, model: nn.Module) -> None:
        config = self.vllm_config.model_config
        with set_default_torch_dtype(config.dtype), self.device, set_current_vllm_config(self.vllm_config):
            process_weights_after_loading(model, config, self.device)


class IsthmusWeightTransferEngine(WeightTransferEngine[Init, Update]):
    """Versions from a folder or over HTTP, verified before they serve."""

    init_info_cls, update_info_cls = Init, Update
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module):
        super().__init__(config, vllm_config, device, model)
        compilation = vllm_config.compilation_config
        eager = vllm_config.model_config.enforce_eager or compilation.cudagraph_mode in (None, CUDAGraphMode.NONE)
        self.standing = Standing(model, VllmMake(vllm_config, device), graphs=not eager)

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    def start_weight_update(self) -> None:
        self.standing.drop()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base does, without waiting for a device: nothing is on its way to one yet."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Update) -> None:
        if update_info.abort:
            self.standing.drop()
            raise GivenUp("the update was given up, as was asked for")
        self.standing.stage(update_info.source)

    def finish_weight_update(self) -> None:
        self.standing.switch()

    def shutdown(self) -> None:
        self.standing.drop()

    def answer(self, ask: str) -> dict[str, Any]:
        """For `isthmus_weights`: the state, or the report. `drafts` says whether another model guesses tokens."""
        if ask == "report":
            return self.standing.report() | {"drafts": self.vllm_config.speculative_config is not None}
        return self.standing.state()
