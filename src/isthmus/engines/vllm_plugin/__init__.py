"""The part of isthmus that lives in a vLLM of any vendor: weights are pulled, verified, and switched to as a whole.

It is a wheel of its own (plugin/), and needs nothing but torch and safetensors beside the vLLM into which it goes.
"""

from __future__ import annotations

from typing import Any

BACKEND = "isthmus"


def register() -> None:
    """The entry point of `vllm.general_plugins`, which vLLM calls in each of its processes."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory  # pyright: ignore[reportMissingImports]
    from vllm.v1.worker.worker_base import WorkerBase  # pyright: ignore[reportMissingImports]

    if BACKEND not in WeightTransferEngineFactory._registry:
        module = f"{__name__}.engine"
        WeightTransferEngineFactory.register_engine(BACKEND, module, "IsthmusWeightTransferEngine")
    WorkerBase.isthmus_weights = isthmus_weights


def isthmus_weights(worker: Any, ask: str = "state") -> dict[str, Any]:
    """A method of vLLM's workers, for /collective_rpc."""
    return worker.weight_transfer_engine.answer(ask)
