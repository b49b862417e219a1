"""The OpenAPI document says what the server does: every route, every field, and the answers that schemathesis gets."""

from __future__ import annotations

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.routing import Route

from isthmus.engines.local.api.keys import Keyring
from isthmus.engines.local.api.protocol import ChatAsk, CompletionAsk
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import load_service
from tests.support.engine_bundle import write_small_bundle
from tests.support.live_server import ask, live

ADMIN, USER = "sk-root", "sk-alice"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
PLAIN = {
    "/v1/completions": {"prompt": "Use 3", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Use 3"}], "max_tokens": 2},
    "/v1/responses": {"input": "Use 3", "max_output_tokens": 2},
    "/tokenize": {"prompt": "Use 3"},
    "/detokenize": {"tokens": [60, 61]},
}
"""Requests that a client would send; those that are drawn are seldom right."""
KEYS = {"ISTHMUS_API_KEYS": f"alice {USER}", "ISTHMUS_ADMIN_KEY": ADMIN}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openapi") / "small"
    write_small_bundle(folder)
    service = load_service(folder, slots=32)
    service.default_tokens = 4
    return Server(service, keys=Keyring.load(environment=KEYS), page=True)


@pytest.fixture(scope="module")
def port(server):
    with live(server) as port:
        yield port


@pytest.fixture(scope="module")
def document(port):
    status, _, content = ask(port, "GET", "/openapi.json")
    assert status == 200
    return content


@settings(derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))
@st.composite
def cases(draw, operation):
    """Requests that fit the document, that break it, and ones with few of their fields, which are more often right."""
    case = draw(operation.as_strategy(generation_mode=draw(st.sampled_from(GenerationMode))))
    if isinstance(case.body, dict) and draw(st.booleans()):
        kept = draw(st.sets(st.sampled_from(["", *case.body]), max_size=2)) | {"prompt", "messages", "tokens"}
        case.body = {name: value for name, value in case.body.items() if name in kept}
    return case


def check_answers(operation, port, examples):
    """Answers to requests for an operation are as documented. Raises what schemathesis finds wrong."""

    @settings(derandomize=True, max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(cases(operation))
    def holds(case):
        headers = {"Authorization": f"Bearer {ADMIN}"}
        case.call_and_validate(headers=headers, checks=CHECKS, timeout=60)
        if operation.path == "/pause":
            assert ask(port, "POST", "/resume", key=ADMIN)[0] == 200

    holds()


def test_whatever_is_asked_the_answer_is_as_documented(port, document):
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"http://127.0.0.1:{port}")
    schema.config.generation.update(with_security_parameters=False)
    for found in schema.get_all_operations():
        operation = found.ok()
        takes = operation.body or operation.query
        check_answers(operation, port, examples=50 if takes else 2)
    for path, body in PLAIN.items():
        case = schema[path]["POST"].Case(body=body, media_type="application/json")
        answer = case.call_and_validate(headers={"Authorization": f"Bearer {USER}"}, checks=CHECKS, timeout=60)
        assert answer.status_code == 200, path


def test_every_route_is_in_the_document(server, document):
    routes = {
        (re.sub(r":\w+}", "}", r.path), method.lower())
        for r in server.app().routes
        if isinstance(r, Route)
        for method in r.methods
    }
    routes -= {(path, "head") for path, _ in routes}
    assert routes == {(path, method) for path, methods in document["paths"].items() for method in methods}


@pytest.mark.parametrize(("path", "kind"), [("/v1/completions", CompletionAsk), ("/v1/chat/completions", ChatAsk)])
def test_every_field_is_in_the_document(document, path, kind):
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    shown = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert set(shown["properties"]) == set(kind.model_fields)
    assert shown["additionalProperties"] is False


def test_the_document_tells_who_may_use_a_route(port, document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            statuses = operation["responses"]
            is_public, is_admin = "security" not in operation, "403" in statuses
            assert (ask(port, method.upper(), path)[0] == 401) == (not is_public), path
            assert (ask(port, method.upper(), path, key=USER)[0] == 403) == is_admin, path
