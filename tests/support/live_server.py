"""A server on a free port in a thread of the test, and small ways to speak to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time

import uvicorn

from isthmus.engines.local.api.host import bind, configuration

PATIENCE_S = 60


@contextlib.contextmanager
def live(server):
    """Serve until the end of the block; yields the port."""
    listener = bind("127.0.0.1", 0, flag="--port")
    host = uvicorn.Server(configuration(server, log_level="error"))
    thread = threading.Thread(target=lambda: host.run(sockets=[listener]))
    thread.start()
    wait_until(lambda: host.started)
    try:
        yield listener.getsockname()[1]
    finally:
        host.should_exit = True
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def ask(port, method, path, body=None, key=None, headers=None):
    """(status, headers, content) of one request; the content is decoded where it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    sent = {
        "Content-Type": "application/json",
        **({"Authorization": f"Bearer {key}"} if key else {}),
        **(headers or {}),
    }
    content = body if body is None or isinstance(body, bytes) else json.dumps(body)
    try:
        connection.request(method, path, content, sent)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, response.headers, json.loads(text) if is_json else text.decode()


def call(port, method, path, body=None, headers=None):
    """(status, content) of one request."""
    status, _, content = ask(port, method, path, body, headers=headers)
    return status, content


def refused(port, path, **fields):
    """The error object of a request that must get a 400."""
    status, body = call(port, "POST", path, fields)
    assert status == 400, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    return body["error"]


def greedy(port, prompt=(0, 2, 60, 61, 4), tokens=12, key=None):
    """The token ids that the server writes at temperature 0."""
    body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0, "return_token_ids": True, "logprobs": 0}
    status, _, answer = ask(port, "POST", "/v1/completions", body, key)
    assert status == 200, answer
    return answer["choices"][0]


def metric(port, name, key=None):
    """The sum of a metric over its labels."""
    status, _, page = ask(port, "GET", "/metrics", key=key)
    assert status == 200
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{name}{{"))


def wait_until(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {PATIENCE_S} s"
        time.sleep(0.005)


class InBackground(threading.Thread):
    """A call in a thread; `result()` waits for what it returns."""

    def __init__(self, call, *args, **options):
        super().__init__(daemon=True)
        self._call, self._args, self._options = call, args, options
        self._found = None
        self.start()

    def run(self):
        self._found = self._call(*self._args, **self._options)

    def result(self):
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self._found
