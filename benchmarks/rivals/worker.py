"""What a contestant without a server of its own speaks on its standard streams, one JSON line each way.

In: a list of requests, `{"prompt": [ids], "new_tokens": n, "at": seconds after now}`. Out: for each, in order,
`{"tokens": [ids], "first": s, "end": s}`, seconds after the list came in. The first line out says that it is ready.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(run: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Answer lists of requests until standard input closes. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
