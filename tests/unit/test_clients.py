"""The scripts of examples/clients against a server: the openai client's always, of others those that are installed."""

from __future__ import annotations

import importlib

import pytest

from tests.unit.test_api import serve  # noqa: F401

CLIENTS = [("openai_python", "openai"), ("litellm_client", "litellm"), ("langchain_client", "langchain_openai")]


@pytest.mark.parametrize(("script", "package"), CLIENTS)
def test_a_client_finds_what_it_asks_for(serve, script, package, capsys):  # noqa: F811
    pytest.importorskip(package)
    served = serve("hermes")
    served.script.texts, served.script.default = [], "I wonder</think>\n\nBergen."
    try:
        importlib.import_module(f"examples.clients.{script}").main(f"http://127.0.0.1:{served.port}")
    finally:
        served.script.default = None
    shown = capsys.readouterr().out
    assert shown.count("Bergen.") >= 2 and "I wonder" not in shown
    assert ("sunny" in shown) == (script != "litellm_client") and ("ContextWindow" in shown) == (
        script == "litellm_client"
    )
