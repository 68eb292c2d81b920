"""The command `hanse-client`. Each module holds commands of one kind, as plain functions that are listed here."""

from hanse_client.cli import league, products
from hanse_client.cli.catalog import catalog, import_products
from hanse_client.cli.comparison import compare
from hanse_client.cli.export import export
from hanse_client.cli.ledger import ledger
from hanse_client.cli.membership import endorse, init, join, members, rotate, show_words
from hanse_client.cli.personal import personalize
from hanse_client.cli.plans import approve, explain, plans, refuse
from hanse_client.cli.product_check import check
from hanse_client.cli.receipts import receipt
from hanse_client.cli.recognition import classify, inventory, search, similar
from hanse_client.cli.releases import update
from hanse_client.cli.running import doctor, history, page, pause, resume, run, status
from hanse_client.cli.serving import serve
from hanse_client.cli.wizard import wizard
from hanse_common import commands

app = commands.new_app(
    "The merchant's side of a Hanse league: look at your photos, judge a plan, see what you spent, "
    "and recognize products. Your photos never leave this machine."
)
for command in (
    init,
    join,
    wizard,
    endorse,
    rotate,
    members,
    catalog,
    import_products,
    run,
    status,
    history,
    pause,
    resume,
    doctor,
    page,
    update,
    explain,
    plans,
    approve,
    refuse,
    ledger,
    receipt,
    compare,
    classify,
    search,
    similar,
    inventory,
    serve,
    personalize,
    export,
):
    app.command()(command)
app.command("words")(show_words)
app.add_typer(league.app, name="league")
products.app.command()(check)
app.add_typer(products.app, name="products")


def main() -> None:
    """Run `hanse-client`."""
    commands.run(app)
