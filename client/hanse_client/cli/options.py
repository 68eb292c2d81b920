"""What the commands share: the configuration's option, and how text is printed."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from hanse_common.commands import out

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Your configuration.", show_default=True, metavar="FILE")
]
DEFAULT_CONFIG = Path("hanse-client.yaml")


def say(text: str) -> None:
    """Print `text` as it is: names may look like rich's markup or emoji codes."""
    out.print(text, markup=False, emoji=False)


def say_now(text: str) -> None:
    """Print `text` with the time; a daemon's lines are read later."""
    say(f"{datetime.now():%H:%M:%S}  {text}")


def photos(count: int) -> str:
    """Return the number of photos in words."""
    return "1 photo" if count == 1 else f"{count} photos"


def confirmed(question: str, yes: bool) -> bool:
    """Return whether the person says yes, or said so beforehand."""
    return yes or typer.confirm(question, default=False)
