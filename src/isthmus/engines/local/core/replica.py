"""What an engine with `batch_invariant` computes, to the last bit: the format's model in the engine's order of sums.

Two machines agree so far if they use the same compiled layers on processors of one kind. Torch's operators look at
whole blocks of the cache: where they are used, torch and the size of blocks must be the same too. `bits` names all
that. Where it differs, rounding does, and an engine is held against healthy twins (parity/twins.py).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from isthmus.engines.local.core.batch import Chunk, StepBatch
from isthmus.engines.local.core.cache import blocks_for
from isthmus.engines.local.core.native import library_digest, processor
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.engines.local.core.runner import Runner
from isthmus.model.model import Model
from isthmus.parity.engine import Exact
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.twins import LOGITS_AT_ONCE


def bits_of(runner: Runner) -> str | None:
    """What decides the last bit of what a runner computes, as a short hash; None if it depends on the batch too."""
    if not runner.row_by_row:
        return None
    library = library_digest() if runner.native is not None else f"torch, blocks of {runner.store.block_size}"
    machine = (torch.backends.cpu.get_cpu_capability(), processor(), *platform.libc_ver())
    return hashlib.sha256("\n".join((library, torch.__version__, *machine)).encode()).hexdigest()[:16]


def exact_for(engine_bits: str | None, build: Callable[[], Model], sequences: Sequence[GoldenSequence]) -> Exact | None:
    """What an engine says of these sequences to the last bit, if it announces the bits that this host computes; `build`
    makes its model.

    None where bits tell nothing: the batch decides them too, or the engine's kernels or processor are others.
    """
    if engine_bits is None:
        return None
    longest = max((len(one.prompt) + len(one.completion) for one in sequences), default=1)
    replica = Replica(build(), longest)
    return replica.logprobs if replica.bits == engine_bits else None


class Replica:
    """A model on the CPU, computed as an engine with `batch_invariant` does. Sequences have up to `longest` tokens."""

    def __init__(self, model: Model, longest: int, threads: int = 1):
        block_size = DEFAULT_OPTIONS.block_size
        self._table = np.arange(1, blocks_for(longest, block_size) + 1, dtype=np.int32)
        self._runner = Runner(model, len(self._table) + 1, block_size, row_by_row=True, threads=threads)

    @property
    def bits(self) -> str | None:
        """As an engine that computes the same bits announces it."""
        return bits_of(self._runner)

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[GoldenSequence]) -> Tensor:
        """Log-probabilities [N] of the completion tokens, in float64 with the bits of float32."""
        found = [torch.zeros(0, dtype=torch.float64)]
        for sequence in sequences:
            tokens = np.array([*sequence.prompt, *sequence.completion])
            hidden = self._runner.hidden(StepBatch(None, [Chunk(tokens, 0, self._table)], self._runner.store))
            taken = torch.tensor(sequence.completion)
            states = hidden[len(sequence.prompt) - 1 : -1]
            for rows, own in zip(states.split(LOGITS_AT_ONCE), taken.split(LOGITS_AT_ONCE), strict=True):
                distribution = torch.log_softmax(self._runner.logits(rows).float().cpu(), dim=-1)
                found.append(distribution.gather(-1, own[:, None]).squeeze(1).double())
        return torch.cat(found)
