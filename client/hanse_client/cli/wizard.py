"""Joining in a browser: `wizard`."""

import os
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from hanse_client.cli.options import say
from hanse_client.enrolment import CONFIG
from hanse_common import commands
from hanse_common.errors import ConfigError
from hanse_common.vision.photo import shown
from hanse_common.web.pages import Language

IDLE_SECONDS = 30 * 60
FAREWELL_SECONDS = 3
"""How long the last page may still fetch what it is made of."""


def wizard(
    folder: Annotated[Path, typer.Argument(help="Where to write everything.", metavar="FOLDER")] = Path(),
    language: Annotated[Language | None, typer.Option(help="Its language at first.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the address and open nothing.")] = False,
) -> None:
    """Join a league in your browser: the questions of init and join, on pages that this machine alone can see.

    It ends when you are done, or after 30 minutes in which nobody used it.
    """
    from hanse_client.page_access import entrance, new_token, opener
    from hanse_client.wizard import Wizard, build
    from hanse_common.web.serving import listen, serving

    if (folder / CONFIG).exists():
        raise ConfigError(
            f"{shown(folder / CONFIG)}: there is a configuration already. To ask for membership with it: hanse-client "
            "join. To join another league: hanse-client wizard FOLDER, with a new folder."
        )
    made = Wizard(folder, language or ("zh" if os.environ.get("LANG", "").startswith("zh") else "en"))
    token = new_token()
    with (
        commands.until_stopped() as stop,
        tempfile.TemporaryDirectory(prefix="hanse-") as private,
        listen(0) as listening,
    ):
        port = listening.getsockname()[1]
        address = entrance(port, token)
        with serving(build(made, port, token), listening):
            say(f"{address}\nOpen this address if your browser does not. Ctrl-C ends it.")
            if not show:
                webbrowser.open(opener(Path(private), address).as_uri())
            while not stop.wait(0.5) and not made.done.is_set() and made.idle < IDLE_SECONDS:
                pass
            if made.done.is_set():
                stop.wait(FAREWELL_SECONDS)
            elif not stop.is_set():
                say("Nobody used it for 30 minutes, so it ended. Nothing that was typed is kept.")
