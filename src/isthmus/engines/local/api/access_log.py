"""The access log: one JSON line per request and per event of the server, without prompts unless asked for."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isthmus.engines.local.api.visit import Visit
from isthmus.run import explain_io_errors

FILES_KEPT = 4
STREAMS = ("stdout", "stderr")


class AccessLog:
    """Writes to `target`: a file, `stdout`, `stderr`, or nowhere if it is None.

    A file is rotated when it reaches `file_bytes`, and `FILES_KEPT` old ones are kept. `log_prompts` adds the texts of
    prompts and completions.
    """

    def __init__(self, target: str | Path | None, *, file_bytes: int = 64 << 20, log_prompts: bool = False):
        self.log_prompts = log_prompts
        self.failure: str | None = None
        """Why nothing is logged any more, if something went wrong."""
        self._logger = logging.Logger("isthmus.access", logging.INFO)
        if target is not None:
            handler = _handler(target, file_bytes)
            handler.handleError = self._give_up
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._logger.addHandler(handler)

    def visit(self, visit: Visit, decode: Callable[[list[int]], str]) -> None:
        """One request, when its answer and the last of its samples have ended."""
        first, last = visit.versions()
        line = {
            "event": "request",
            "request_id": visit.id,
            "key": visit.key_name,
            "method": visit.method,
            "route": visit.route,
            "status": visit.status,
            "error": visit.error,
            "stream": visit.stream,
            "prompt_tokens": visit.prompt_tokens,
            "cached_tokens": sum(sample.cached_tokens for sample in visit.samples),
            "completion_tokens": visit.generated_tokens,
            "first_token_s": visit.first_token_s(),
            "duration_s": round(time.monotonic() - visit.began, 6),
            "finish_reasons": [sample.finish_reason for sample in visit.samples],
            "weight_versions": [first, last],
        }
        if self.log_prompts:
            completions = [decode(sample.tokens) for sample in visit.samples]
            line |= {"prompts": [decode(prompt) for prompt in visit.prompts], "completions": completions}
        self._write(line)

    def event(self, event: str, **fields: Any) -> None:
        """Something that happened to the server itself, such as a weight update or a canary's alarm."""
        self._write({"event": event, **fields})

    def close(self) -> None:
        for handler in self._logger.handlers:
            handler.close()

    def _give_up(self, record: logging.LogRecord) -> None:
        """Stop after the first line that cannot be written, and say so once. Called where the exception is handled."""
        self.failure = f"the access log cannot be written: {sys.exc_info()[1]}"
        logging.getLogger(__name__).error("%s; nothing more is logged until a restart", self.failure)
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)

    def _write(self, line: dict[str, Any]) -> None:
        if self._logger.handlers:
            stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._logger.info(json.dumps({"time": stamp, **line}, ensure_ascii=False))


def _handler(target: str | Path, file_bytes: int) -> logging.Handler:
    if str(target) in STREAMS:
        return logging.StreamHandler(getattr(sys, str(target)))
    path = Path(target)
    with explain_io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return logging.handlers.RotatingFileHandler(path, maxBytes=file_bytes, backupCount=FILES_KEPT)
