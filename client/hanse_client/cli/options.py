"""What the commands share: the configuration's option, options that several have, and how text is printed."""

import inspect
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from hanse_common.commands import out

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Your configuration.", show_default=True, metavar="FILE")
]
DEFAULT_CONFIG = Path("hanse-client.yaml")


def with_options(name: str, made: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator of a command that has, in place of its parameter `name`, the options that `made` takes.

    The command gets what `made` returns for them. Errors that `made` raises are the command's.
    """
    options = inspect.signature(made).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(**given: Any) -> None:
            said = {option: given.pop(option) for option in options}
            command(**given, **{name: made(**said)})

        own = inspect.signature(command).parameters.values()
        taken = [option for one in own for option in (options.values() if one.name == name else (one,))]
        signed: Any = called
        signed.__signature__ = inspect.Signature(taken)
        return called

    return decorate


def say(text: str) -> None:
    """Print `text` as it is: names may look like rich's markup or emoji codes."""
    out.print(text, markup=False, emoji=False)


def say_now(text: str) -> None:
    """Print `text` with the time; a daemon's lines are read later."""
    say(f"{datetime.now():%H:%M:%S}  {text}")


def counted(count: int, what: str) -> str:
    """Return a number of things, each of which is a `what`."""
    return f"1 {what}" if count == 1 else f"{count} {what}s"


def photos(count: int) -> str:
    """Return the number of photos in words."""
    return counted(count, "photo")


def confirmed(question: str, yes: bool) -> bool:
    """Return whether the person says yes, or said so beforehand."""
    return yes or typer.confirm(question, default=False)
