"""Questions to a service behind a URL: JSON in and out, asked again where that may help."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from isthmus.errors import IsthmusError

BUSY = frozenset({408, 409, 425, 429})
"""Answers, beside those from 500 on, after which the same question may be answered."""
LONGEST_WAIT_S = 30.0


class Unanswered(Exception):
    """No answer, also after the last try; the reason is a few words."""


def post_json(
    url: str, body: dict[str, Any], *, headers: dict[str, str], timeout_s: float, retries: int, wait_s: float
) -> Any:
    """The JSON that a service answers. Waits `wait_s` before the first retry, twice as long before each further one.

    Raises Unanswered, and IsthmusError where the service refuses the question, for it will refuse the next one.
    """
    content = json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json", **headers})
    reason, pause = "", wait_s
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(pause, LONGEST_WAIT_S))
            pause *= 2
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode(errors="replace")
            if error.code < 500 and error.code not in BUSY:
                raise IsthmusError(f"{url} refuses what it is asked, with HTTP {error.code}: {said}") from None
            reason = f"HTTP {error.code}"
            pause = max(pause, _asked_pause(error))
        except TimeoutError:
            reason = "timed out"
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            reason = "timed out" if isinstance(cause, TimeoutError) else f"no connection: {type(cause).__name__}"
        except ValueError:
            reason = "the answer is no JSON"
    raise Unanswered(reason)


def _asked_pause(error: urllib.error.HTTPError) -> float:
    """Seconds that a busy service asks to wait; none if it gives a date, or nothing."""
    asked = error.headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0
