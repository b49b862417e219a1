"""Hostile clients over real sockets: each gets a 4xx or a closed connection in time, and the next request is served."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket

import pytest

from isthmus.engines.local.api import host as host_module
from isthmus.engines.local.api import intake as intake_module
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import load_service
from tests.support.engine_bundle import write_small_bundle
from tests.support.live_server import PATIENCE_S, ask, greedy, live, wait_until

ADMIN = "sk-root"
JSON = "Content-Type: application/json\r\n"
BODY = '{"prompt": [5, 6], "max_tokens": 2}'


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "small"
    write_small_bundle(folder)
    with live(Server(load_service(folder, slots=8), admin_key=ADMIN, page=True)) as port:
        yield port


@pytest.fixture(autouse=True)
def serves_on(port):
    """After whatever a test does, the next ordinary request has the answer that the first one had."""
    before = greedy(port)["token_ids"]
    yield
    assert greedy(port)["token_ids"] == before
    assert ask(port, "GET", "/health")[2]["running"] == 0


@contextlib.contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        yield connection


def said(connection) -> bytes:
    """All that the server says until it closes the connection."""
    text = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            text += part
    return text


def raw(port, request: bytes | str) -> tuple[int, bytes]:
    """The status and the body of what a server answers to these bytes; (0, b"") if it only closes the connection."""
    with connected(port) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request.encode() if isinstance(request, str) else request)
            connection.shutdown(socket.SHUT_WR)
        head, _, body = said(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def post(fields: str, body: str = BODY, version: str = "1.1") -> str:
    return f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n{fields}\r\n{body}"


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/v1/completions", {"prompt": "word " * 200_000}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 200_000}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 9_000}, "messages"),
        ("/tokenize", {"prompt": "word " * 200_000}, "prompt"),
        ("/detokenize", {"tokens": [1 << 62]}, "tokens"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(n): 1 for n in range(19_000)}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"9" * 4000: 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "stop": "a" * 1_000_000}, "stop"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1 << 80}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "n": 1 << 31}, "n"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "top_k": -(1 << 70)}, "top_k"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "(" * 20_000}}, "structured_outputs"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "(a{9999}){9999}"}}, "structured_outputs"),
        ("/v1/completions", {"prompt": "a", "x" * 1_000_000: 1}, "x" * 1_000_000),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}] * 30_000}, "tools"),
    ],
    ids=lambda value: f"{value:.20}" if isinstance(value, str) else ",".join(value)[:40],
)
def test_fields_of_absurd_size_are_refused_by_name(port, path, fields, named):
    status, _, content = ask(port, "POST", path, fields)
    assert status == 400 and content["error"]["param"] == named
    assert len(content["error"]["message"]) < 3000


def test_a_body_over_the_limit_is_refused_before_it_is_read(port):
    status, body = raw(port, post(f"{JSON}Content-Length: {intake_module.MAX_BODY_BYTES + 1}\r\n", ""))
    assert status == 413 and json.loads(body)["error"]["message"]
    assert raw(port, post(f"{JSON}Content-Length: {'9' * 18}\r\n"))[0] == 413


@pytest.mark.parametrize("announced", [True, False])
def test_a_client_that_sends_all_of_too_long_a_body_reads_why_it_is_refused(port, announced):
    """As http.client and requests do; a connection that is closed on unread bytes would be reset under them."""
    body = b" " * (intake_module.MAX_BODY_BYTES + (4 << 20))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        parts = body if announced else (body[start : start + (1 << 20)] for start in range(0, len(body), 1 << 20))
        connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 413 and answer.headers["Connection"] == "close"
        assert str(intake_module.MAX_BODY_BYTES) in json.loads(answer.read())["error"]["message"]


def test_a_refused_body_is_not_read_for_ever(port, monkeypatch):
    monkeypatch.setattr(host_module, "MAX_DISCARDED_BYTES", 1 << 20)
    with connected(port) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(post(f"{JSON}Content-Length: {64 << 20}\r\n", "").encode())
        for sent in range(64):
            assert sent < 40, "the server went on reading"
            connection.sendall(b" " * (1 << 20))


def test_an_endless_body_is_cut_off(port, monkeypatch):
    monkeypatch.setattr(intake_module, "MAX_BODY_BYTES", 1 << 20)
    with connected(port) as connection:
        connection.sendall(post(f"{JSON}Transfer-Encoding: chunked\r\n", "").encode())
        chunk, sent = b"10000\r\n" + b" " * 0x10000 + b"\r\n", 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                connection.sendall(chunk)
                sent += len(chunk)
        assert sent < 64 << 20, "the server went on reading"
        answer = said(connection)
    assert not answer or answer.startswith(b"HTTP/1.1 413"), answer[:200]


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=a",
        "application/jsonx",
        ";",
    ],
)
def test_other_content_types_are_refused(port, content_type):
    header = f"Content-Type: {content_type}\r\n" if content_type else ""
    status, body = raw(port, post(f"{header}Content-Length: {len(BODY)}\r\n"))
    assert status == 415 and "application/json" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        BODY.encode("utf-16"),
        b"\x1f\x8b\x08\x00" + bytes(50),
        b"\x00" * 1000,
        b'{"prompt": "a"}{"prompt": "a"}',
        b"\xef\xbb\xbf{}",
    ],
    ids=["UTF-16", "gzip", "zeros", "two objects", "byte order mark"],
)
def test_bodies_that_only_claim_to_be_json(port, body):
    fields = f"Host: localhost\r\nConnection: close\r\n{JSON}Content-Length: {len(body)}\r\n\r\n"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}"
    status, answer = raw(port, head.encode() + body)
    assert status == 400 and json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\xff\xfe\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"G@T /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 400_000 + b"\r\n",
        b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        post(f"{JSON}Content-Length: -1\r\n").encode(),
        post(f"{JSON}Content-Length: 35\r\nContent-Length: 36\r\n").encode(),
        post(f"{JSON}Content-Length: 0x23\r\n").encode(),
        post(f"{JSON}Content-Length: {'9' * 5000}\r\n").encode(),
        post(f"{JSON}Transfer-Encoding: gzip\r\n").encode(),
        post(f"{JSON}Transfer-Encoding: chunked\r\n", "zz\r\n").encode(),
        post(f"{JSON}Transfer-Encoding: chunked\r\n", "f" * 40 + "\r\n").encode(),
    ],
    ids=lambda request: request[:60].decode("latin-1").encode("unicode_escape").decode(),
)
def test_what_is_not_http_gets_400_or_nothing(port, request_bytes):
    assert raw(port, request_bytes)[0] in (0, 400, 413, 501)


def test_one_message_is_never_read_as_two(port):
    """Content-Length and Transfer-Encoding together: whoever reads the other one would see a second request."""
    hidden = "GET /weight_info HTTP/1.1\r\nHost: localhost\r\n\r\n"
    body = f"0\r\n\r\n{hidden}"
    fields = f"{JSON}Content-Length: {len(body)}\r\nTransfer-Encoding: chunked\r\n"
    with connected(port) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{fields}\r\n{body}".encode()
        )
        connection.shutdown(socket.SHUT_WR)
        assert said(connection).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("body", [BODY, BODY.replace("}", ', "stream": true}')])
def test_http_1_0_is_served_and_ends_with_its_connection(port, body):
    with connected(port) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.0\r\n{JSON}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = said(connection)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"chunked" not in head.lower()
    assert content.endswith(b"data: [DONE]\n\n") if "stream" in body else json.loads(content)["choices"]


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/./server.py",
        "/../server.py",
        "/chat.js/../../server.py",
        "/chat.js%00.py",
        "/static/chat.js",
        "/\\..\\..\\etc\\passwd",
        "/%ff%fe",
    ],
)
def test_files_outside_the_page_are_not_there(port, path):
    status, body = raw(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status == 404 and json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "query", "named"),
    [
        ("/pause", "mode=now", "mode"),
        ("/pause", "seconds=0", "seconds"),
        ("/pause", f"seconds={'9' * 400}", "seconds"),
        ("/pause", f"seconds={'9' * 5000}", "seconds"),
        ("/pause", "seconds=1e3", "seconds"),
        ("/pause", "seconds=nan", "seconds"),
        ("/pause", "second=1", "second"),
        ("/pause", "mode=keep&mode=wait", None),
        ("/start_weight_update", "", "version"),
        ("/start_weight_update", "version=", "version"),
        ("/start_weight_update", "version=-1", "version"),
        ("/start_weight_update", f"version={1 << 63}", "version"),
        ("/start_weight_update", f"version={'9' * 400}", "version"),
        ("/start_weight_update", "version=1&abort=1", "abort"),
        ("/start_weight_update", "version=1&format=%00%ff", "format"),
        ("/update_weights", "version=1", "sha256"),
        ("/update_weights", "version=1&sha256=", "sha256"),
        ("/finish_weight_update", "version=%31%32x", "version"),
    ],
)
def test_bad_queries_are_refused_by_name_and_change_nothing(port, path, query, named):
    status, _, content = ask(port, "POST", f"{path}?{query}", key=ADMIN)
    assert status == 400 and content["error"]["param"] == named
    info = ask(port, "GET", "/weight_info", key=ADMIN)[2]
    assert (info["version"], info["update"], info["paused"]) == (0, None, False)


@pytest.mark.parametrize("key", ["Bearer ", "Bearer \xff\xfe", "Basic c2stcm9vdA==", "Bearer sk-root sk-root", "\t"])
def test_odd_authorization_opens_nothing(port, key):
    head = f"GET /weight_info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: {key}\r\n\r\n"
    assert raw(port, head.encode("latin-1"))[0] in (400, 401)


def is_closed(connection) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1 << 16)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "beginning",
    [
        "",
        "GET /hea",
        "GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
        f"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: 1000\r\n\r\n" + "{",
    ],
    ids=["nothing", "half a line", "half the headers", "half of the second request", "half of an unread body"],
)
def test_half_requests_end_and_others_are_served_meanwhile(port, monkeypatch, beginning):
    monkeypatch.setattr(host_module, "REQUEST_S", 0.5)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(port)) for _ in range(100)]
        for connection in connections:
            connection.sendall(beginning.encode())
        greedy(port)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"a")
        for connection in connections:
            wait_until(lambda one=connection: is_closed(one))


def test_a_body_that_does_not_come_ends_with_408(port, monkeypatch):
    monkeypatch.setattr(intake_module, "BODY_S", 0.2)
    with connected(port) as connection:
        connection.sendall(post(f"{JSON}Content-Length: 1000\r\n", '{"prompt"').encode())
        answer = said(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()


def test_a_body_may_take_longer_than_the_headers(port, monkeypatch):
    monkeypatch.setattr(host_module, "REQUEST_S", 0.2)
    with connected(port) as connection:
        connection.sendall(post(f"{JSON}Content-Length: {len(BODY)}\r\n", BODY[:5]).encode())
        with connected(port) as later:
            wait_until(lambda: is_closed(later))
        connection.sendall(BODY[5:].encode())
        assert said(connection).startswith(b"HTTP/1.1 200")
