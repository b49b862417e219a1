"""What a person sees of something that rich can draw."""

from __future__ import annotations

from rich.console import Console


def printed(renderable: object, width: int = 160) -> str:
    """Its text on a terminal of so many columns."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
