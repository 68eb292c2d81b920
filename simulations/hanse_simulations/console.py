"""What a person sees while an experiment runs: a live line, and one line a round where there is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False)


class Bar:
    """A progress bar with a text at its end. Without a terminal it prints a line at each tenth."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._description = description
        self._total = total
        self._task = progress.add_task(description, total=total, text="")
        self._tenths = 0

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        """Move the bar to `done` (of `total`, where that was not known before)."""
        self._total = total or self._total
        self._progress.update(self._task, completed=done, total=self._total, text=text)
        tenths = 10 * done // max(self._total, 1)
        if not console.is_terminal and tenths > self._tenths:
            console.print(f"  {self._description} {done}/{self._total} {text}".rstrip())
        self._tenths = max(tenths, self._tenths)


@contextmanager
def bar(description: str, total: int) -> Iterator[Bar]:
    """Show a progress bar while the body runs."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, description, total)
