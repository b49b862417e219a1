"""Which server is behind a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isthmus.engines import EngineError
from isthmus.engines.remote.dialect import Dialect, Exchange
from isthmus.engines.remote.isthmus import Isthmus
from isthmus.engines.remote.openai import OpenAi
from isthmus.engines.remote.plugged import PluggedVllm, is_plugged
from isthmus.engines.remote.prepared import Prepared
from isthmus.engines.remote.sglang import SgLang
from isthmus.engines.remote.transport import Refused, Transport
from isthmus.engines.remote.vllm import Vllm


def recognise(transport: Transport, bundle: Path | None, exchange: Path | None, prepared: Prepared) -> Dialect:
    """The dialect of the server: ours by its /health, the others by `owned_by` of their first model."""
    health = _get_or_none(transport, "/health")
    if isinstance(health, dict) and health.get("engine") == "isthmus":
        return Isthmus(transport, health)
    model = _first_model(transport)
    owner = str(model.get("owned_by", "")).lower()
    if owner == "vllm":
        release = (_get_or_none(transport, "/version") or {}).get("version")
        facts = transport, model["id"], model.get("root"), release, Exchange(exchange, bundle, prepared)
        config = (_get_or_none(transport, "/server_info?config_format=json") or {}).get("vllm_config")
        if isinstance(config, dict) and is_plugged(config):
            return PluggedVllm(*facts, config)
        return Vllm(*facts)
    if owner == "sglang":
        facts = _get_or_none(transport, "/server_info") or _get_or_none(transport, "/get_server_info") or {}
        return SgLang(transport, facts, Exchange(exchange, bundle, prepared))
    return OpenAi(transport, model["id"])


def _first_model(transport: Transport) -> dict[str, Any]:
    answer = transport.get("/v1/models")
    try:
        model = answer["data"][0]
        return model | {"id": str(model["id"])}
    except (KeyError, IndexError, TypeError):
        raise EngineError(f"the server at {transport.url} lists no model under /v1/models; is it an engine?") from None


def _get_or_none(transport: Transport, path: str) -> Any:
    """What a route says that not every server has."""
    try:
        return transport.get(path)
    except Refused as error:
        if error.status in (404, 405):
            return None
        raise
