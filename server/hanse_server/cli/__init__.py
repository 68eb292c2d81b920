"""The command `hanse-server`. Each module holds commands of one kind, as plain functions that are listed here."""

from hanse_common import commands
from hanse_server.cli.counting import trends
from hanse_server.cli.plans import check, fit_whitening, keygen, sign
from hanse_server.cli.records import audit, backup, migrate, restore
from hanse_server.cli.registry import export, finish, publish, rollback, versions
from hanse_server.cli.rehearsing import rehearse
from hanse_server.cli.running import page, resume, run, serve, status, stop
from hanse_server.cli.setup import card, keys

app = commands.new_app(
    "The operator's side of a Hanse league: see what a plan costs the merchants, sign it, train it with them, and "
    "release the recognizer. The server coordinates; it never sees a photo."
)
for command in (
    keygen,
    keys,
    card,
    check,
    rehearse,
    fit_whitening,
    sign,
    run,
    resume,
    stop,
    serve,
    status,
    page,
    versions,
    finish,
    publish,
    rollback,
    export,
    trends,
    audit,
    backup,
    restore,
    migrate,
):
    app.command()(command)


def main() -> None:
    """Run `hanse-server`."""
    commands.run(app)
