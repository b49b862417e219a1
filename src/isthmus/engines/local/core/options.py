"""How the local engine works on a bundle, whatever the bundle is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """The options of `Core`, which explains them. `cache_tokens` None: what the slots need, within 2 GiB."""

    block_size: int = 16
    cache_tokens: int | None = None
    chunk_tokens: int = 512
    prefix_cache: bool = True
    speculate: bool = False
    batch_invariant: bool = False

    def flags(self) -> list[str]:
        """As arguments of the engine's process."""
        numbers = {"--block-size": self.block_size, "--cache-tokens": self.cache_tokens}
        numbers["--chunk-tokens"] = self.chunk_tokens
        given = [part for name, value in numbers.items() if value is not None for part in (name, str(value))]
        switches = {"--no-prefix-cache": not self.prefix_cache, "--speculate": self.speculate}
        switches["--batch-invariant"] = self.batch_invariant
        return given + [name for name, on in switches.items() if on]


DEFAULT_OPTIONS = EngineOptions()
