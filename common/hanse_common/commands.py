"""What the three commands share: how an error becomes one clear line and an exit code of its own."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console

from hanse_common.errors import HanseError

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(highlight=False, soft_wrap=True, emoji=False, stderr=True)


def new_app(help_text: str) -> typer.Typer:
    """Return a typer application that shows `help_text` when called without a command."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def complain(error: HanseError) -> None:
    """Print `error` to standard error, each of its lines behind the word error."""
    for line in str(error).splitlines():
        err.print("[red]error:[/red]", end=" ")
        err.print(line, markup=False)


@contextmanager
def until_stopped() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and Ctrl-C set, for a daemon to end in order; a second Ctrl-C ends at once.

    Call it in the main thread.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(app: typer.Typer) -> None:
    """Run the command line; a `HanseError` is shown as it reads, and its exit code is returned."""
    try:
        app()
    except HanseError as error:
        complain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)
    except SystemExit as ended:
        if ended.code == 130:  # typer's way to end after Ctrl-C
            err.print("stopped")
        raise
