"""What a person watches while a stage runs: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

LINE_INTERVAL_S = 15.0


class Counter:
    """One running task. `advance_to` sets the finished steps and the text beside the bar."""

    def __init__(self, title: str, total: int, console: Console, bar: Progress | None):
        self.title, self.total, self.done = title, total, 0
        self._console, self._bar = console, bar
        self._task = bar.add_task(title, total=total, status="") if bar else None
        self._last_line = time.monotonic()

    def advance_to(self, done: int, status: str = "") -> None:
        self.done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif done >= self.total or time.monotonic() - self._last_line > LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            self._console.print(f"  {self.title} {done}/{self.total}  {status}", highlight=False, soft_wrap=True)

    def tell(self, status: str, done: int, total: int) -> None:
        """Progress of work whose size is known only when it runs."""
        if total != self.total and self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)
        self.total = total
        self.advance_to(done, status)

    def say(self, text: str) -> None:
        """Print one line above the bar; rich markup is honoured."""
        self._console.print(f"  {text}", highlight=False)


class StatusColumn(TextColumn):
    """The text beside the bar. Where the terminal is too narrow for all, it is cut, and everything else is shown."""

    def __init__(self) -> None:
        super().__init__("{task.fields[status]}", table_column=Column(overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap = True
        return text


class Watch:
    """Says what happens, on one console."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(quiet=quiet)

    def say(self, text: str) -> None:
        """Print one line; rich markup is honoured."""
        self.console.print(text, highlight=False)

    @contextlib.contextmanager
    def count(self, title: str, total: int) -> Iterator[Counter]:
        """Show `total` steps of work."""
        if not self.console.is_terminal:
            yield Counter(title, total, self.console, None)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            StatusColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            yield Counter(title, total, self.console, bar)
