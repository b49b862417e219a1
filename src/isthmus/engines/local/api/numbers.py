"""Whether the weights in use still answer numbers: where a sample ended without one, they read its text again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from isthmus.engines.local.api.service import Service
from isthmus.engines.local.api.visit import Visit
from isthmus.engines.local.core.scheduler import Finished, Token

logger = logging.getLogger(__name__)


class Numbers:
    """Follows visits. A sample may end so by its own options; only what the model alone answers counts.

    `tell` is called with the reason, from a thread of its own, once for each exchange of weights.
    """

    def __init__(self, service: Service, tell: Callable[[str], None]):
        self._service, self._tell = service, tell
        self._broken: int | None = None
        self._looking = threading.Lock()

    @property
    def broken(self) -> bool:
        """Whether the weights that are in use now have been found to answer what is not a number."""
        return self._broken == self._service.revision

    def token(self, visit: Visit, token: Token) -> None:
        """Nothing is learnt from a token."""

    def finished(self, visit: Visit, sample: Finished) -> None:
        """Called from the engine's thread."""
        if sample.finish_reason != "error" or self.broken or not self._looking.acquire(blocking=False):
            return
        text = [*visit.prompts[sample.choice // visit.n], *sample.tokens][: self._service.core.length]
        threading.Thread(target=self._look, args=(text,), name="numbers", daemon=True).start()

    def _look(self, text: list[int]) -> None:
        try:
            revision = self._service.revision
            if self._service.answers_numbers(text) or self._service.revision != revision:
                return
            self._broken = revision
        finally:
            self._looking.release()
        reason = f"the weights in use (version {self._service.core.version}) answer what is not a number"
        logger.error("%s", reason)
        self._tell(reason)
