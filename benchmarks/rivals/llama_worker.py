"""llama.cpp as a contestant: continuous batching over its C interface, in the environment that has llama-cpp-python.

    python benchmarks/rivals/llama_worker.py MODEL.gguf THREADS

Each step decodes one token of every running sequence together with the whole prompts of what has arrived, as
llama.cpp's server does; the Python package has no server that batches. Lines on standard input and output are those of
worker.py.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import llama_cpp as llama
import numpy as np
from worker import serve

SEQUENCES, CONTEXT = 32, 512


class Llama:
    """One model with a cache for `SEQUENCES` sequences of `CONTEXT` tokens, in fp32 as the weights are."""

    def __init__(self, path: str, threads: int):
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = llama.llama_context_default_params()
        options.n_ctx = SEQUENCES * CONTEXT
        options.n_seq_max = SEQUENCES
        options.n_batch = options.n_ubatch = 2048
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = llama.GGML_TYPE_F32
        self.context = llama.llama_init_from_model(self.model, options)
        self.memory = llama.llama_get_memory(self.context)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(options.n_batch, 0, 1)

    def step(self, rows: list[tuple[int, int, list[int]]]) -> list[int]:
        """The likeliest next token for each of `rows`: sequence, position of its first new token, new tokens."""
        batch, last, count = self.batch, [], 0
        for sequence, position, tokens in rows:
            for offset, token in enumerate(tokens):
                batch.token[count], batch.pos[count] = token, position + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = offset == len(tokens) - 1
                count += 1
            last.append(count - 1)
        batch.n_tokens = count
        if llama.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode a batch")
        return [int(np.argmax(self._logits(index))) for index in last]

    def forget(self, sequence: int) -> None:
        llama.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def _logits(self, index: int) -> np.ndarray:
        address = ctypes.cast(llama.llama_get_logits_ith(self.context, index), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (self.vocabulary,))

    def run(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Serve requests as they arrive; times count from now."""
        began = time.perf_counter()
        answers: list[dict[str, Any]] = [{"tokens": []} for _ in requests]
        waiting = sorted(range(len(requests)), key=lambda number: requests[number]["at"])
        running: dict[int, int] = {}
        while waiting or running:
            now = time.perf_counter() - began
            if not running and requests[waiting[0]]["at"] > now:
                time.sleep(requests[waiting[0]]["at"] - now)
                continue
            rows = [self._next(number, sequence, requests, answers) for sequence, number in running.items()]
            room = self._room(rows)
            while waiting and len(running) < SEQUENCES and requests[waiting[0]]["at"] <= now:
                prompt = requests[waiting[0]]["prompt"]
                if len(prompt) > room:
                    break
                sequence = next(free for free in range(SEQUENCES) if free not in running)
                running[sequence] = waiting.pop(0)
                rows.append((sequence, 0, prompt))
                room -= len(prompt)
            drawn = self.step(rows)
            now = time.perf_counter() - began
            for (sequence, _, _), token in zip(rows, drawn, strict=True):
                answer = answers[running[sequence]]
                answer["tokens"].append(token)
                answer.setdefault("first", now)
                if len(answer["tokens"]) == requests[running[sequence]]["new_tokens"]:
                    answer["end"] = now
                    self.forget(sequence)
                    del running[sequence]
        return answers

    def _next(self, number: int, sequence: int, requests: list, answers: list) -> tuple[int, int, list[int]]:
        tokens = answers[number]["tokens"]
        return sequence, len(requests[number]["prompt"]) + len(tokens) - 1, tokens[-1:]

    def _room(self, rows: list) -> int:
        return llama.llama_n_batch(self.context) - len(rows)


if __name__ == "__main__":
    serve(Llama(sys.argv[1], int(sys.argv[2])).run)
