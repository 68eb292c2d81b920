"""The command `hanse-client`. Each module holds commands of one kind, as plain functions that are listed here."""

from hanse_client.cli.catalog import catalog
from hanse_client.cli.ledger import ledger
from hanse_client.cli.membership import keygen, sign_directory
from hanse_client.cli.plans import explain
from hanse_client.cli.recognition import classify
from hanse_client.cli.running import run
from hanse_common import commands

app = commands.new_app(
    "The merchant's side of a Hanse league: look at your photos, judge a plan, see what you spent, "
    "and recognize products. Your photos never leave this machine."
)
for command in (catalog, keygen, sign_directory, run, explain, ledger, classify):
    app.command()(command)


def main() -> None:
    """Run `hanse-client`."""
    commands.run(app)
