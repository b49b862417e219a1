"""What a completion is: a thought, the mark that ends it, and an answer."""

from __future__ import annotations

THINK, END_THINK = "<think>", "</think>"


def completion_text(thought: str, answer: str) -> str:
    """A completion as the model writes it: the prompt has already opened <think>."""
    return f"{thought}{END_THINK}\n\n{answer}"


def split_completion(text: str) -> tuple[str, str | None]:
    """(thought, answer) of a completion; the answer is None if the thinking was not closed exactly once."""
    thought, separator, answer = text.removeprefix(f"{THINK}\n").partition(END_THINK)
    if not separator or END_THINK in answer or THINK in answer:
        return thought, None
    return thought, answer.strip()
