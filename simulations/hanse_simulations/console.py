"""What a person sees while an experiment runs: a live line in a terminal, else a line when something is done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False, emoji=False)


class Bar:
    """A progress bar with a text at its end. Without a terminal it prints a line when full, or at each tenth."""

    def __init__(self, progress: Progress, description: str, total: int, tenths: bool) -> None:
        self._progress = progress
        self._description = description
        self._total = total
        self._task = progress.add_task(description, total=total, text="")
        self._parts = 10 if tenths else 1
        self._printed = 0
        self._started = time.perf_counter()

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        """Move the bar to `done` (of `total`, where that was not known before)."""
        self._total = total or self._total
        self._progress.update(self._task, completed=done, total=self._total, text=text)
        part = self._parts * done // max(self._total, 1)
        if not console.is_terminal and part > self._printed:
            seconds = f"{time.perf_counter() - self._started:.0f} s"
            line = ", ".join(filter(None, (f"  {self._description} {done}/{self._total}", text, seconds)))
            console.print(line, soft_wrap=True)
        self._printed = max(part, self._printed)


@contextmanager
def bar(description: str, total: int, *, tenths: bool = False) -> Iterator[Bar]:
    """Show a progress bar while the body runs."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, description, total, tenths)
