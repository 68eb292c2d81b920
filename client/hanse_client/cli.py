"""The command `hanse-client`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hanse_client.config import ClientConfig
from hanse_common import commands, wire
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError, PhotoError, PlanRefused
from hanse_common.plan import Plan, SignedPlan

app = commands.new_app(
    "The merchant's side of a Hanse league: look at your photos, judge a plan, see what you spent, "
    "and recognize products. Your photos never leave this machine."
)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Your configuration.", show_default=True, metavar="FILE")
]
DEFAULT_CONFIG = Path("hanse-client.yaml")


@app.command()
def catalog(
    config: ConfigOption = DEFAULT_CONFIG,
    problems: Annotated[int, typer.Option(help="How many unusable photos to list.")] = 20,
) -> None:
    """Look through your photos: how many of each class, which labels have no class, which files are unusable."""
    from hanse_client.shop import Shop  # torch takes seconds to load, and --help should not

    settings = load(ClientConfig, config)
    shop = Shop(settings)
    with out.status("reading photos"):
        found = shop.catalog()
    classes = settings.league.taxonomy.classes
    table = Table("class", "to train on", "held out", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for index, name in enumerate(classes):
        counts = [sum(r.label == index for r in side) for side in (found.train, found.holdout)]
        table.add_row(name, *(str(count) for count in counts))
    table.add_row("all", str(len(found.train)), str(len(found.holdout)), style="bold")
    out.print(table)
    if found.unmapped:
        out.print(
            "\nLabels without a class of the league; map them in the file named under [bold]labels[/bold]:"
        )
        for label, count in found.unmapped.items():
            out.print(f"  {label} ({count} photos)", markup=False)
    if found.problems:
        out.print(f"\n{len(found.problems)} photos can't be used:")
        for problem in found.problems[:problems]:
            out.print(f"  {problem.reason}", markup=False)
        if len(found.problems) > problems:
            out.print(f"  ... and {len(found.problems) - problems} more")


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="The plan file the operator gave you.", metavar="PLAN")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Say in plain words what a plan would do with your photos, and whether your policy allows it.

    Exit code 3 when it doesn't.
    """
    settings = load(ClientConfig, config)
    found = _read_plan(plan, bytes.fromhex(settings.league.operator_key))
    taxonomy = settings.league.taxonomy
    out.print("\n".join(settings.policy.explain(found)), markup=False)
    reasons = settings.policy.reasons(found, taxonomy)
    if reasons:
        out.print("\n[red]Your policy refuses this plan:[/red]")
        out.print("\n".join(f"- {reason}" for reason in reasons), markup=False)
        raise typer.Exit(PlanRefused.exit_code)
    out.print("\n[green]Your policy allows this plan.[/green]")


@app.command()
def ledger(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Show what your photos have paid: ε and δ for each plan, and what is left of your budget."""
    from hanse_client.shop import Shop

    kept = Shop(load(ClientConfig, config)).ledger()
    spent = kept.spent()
    table = Table("plan", "rounds", "steps", "ε", "δ", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for one in spent.plans:
        steps = f"{one.steps} of {one.plan_steps}"
        table.add_row(
            one.plan_digest.hex()[:16], str(one.rounds), steps, f"{one.epsilon:.3f}", f"{one.delta:g}"
        )
    if spent.plans:
        out.print(table)
        out.print()
    out.print(
        f"Spent for any one photo: ε = {spent.epsilon:.3f} of {kept.budget.epsilon:g}, "
        f"δ = {spent.delta:g} of {kept.budget.delta:g}, in {kept.counter} rounds. The ledger is sound."
    )


@app.command()
def classify(
    photos: Annotated[list[Path], typer.Argument(help="Photos to classify.", metavar="PHOTO...")],
    recognizer: Annotated[
        Path | None, typer.Option("--recognizer", "-r", help="Folder of the recognizer.", metavar="FOLDER")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    top: Annotated[int, typer.Option(help="How many classes to show.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a photo.")] = False,
) -> None:
    """Say what is on a photo, and how sure the recognizer is.

    Exit codes: 21 no such file, 22 not a photo or damaged, 23 too large; other photos are classified all the same.
    """
    from hanse_common.vision.photo import decode
    from hanse_common.vision.recognizer import Recognizer

    folder = recognizer or load(ClientConfig, config).recognizer
    if folder is None:
        raise ConfigError(f"{config}: recognizer: missing; name one here or with --recognizer FOLDER.")
    model = Recognizer.load(folder)
    classes = model.card.taxonomy.classes
    failed: PhotoError | None = None
    for path in photos:
        try:
            image = decode(path)
        except PhotoError as error:
            commands.complain(error)
            failed = failed or error
            continue
        probabilities = model.predict([image])[0]
        ranked = sorted(zip(classes, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])
        if as_json:
            out.print(json.dumps({"photo": str(path), "probabilities": dict(ranked)}), markup=False)
        else:
            shown = ", ".join(f"{name} {100 * share:.1f} %" for name, share in ranked[:top])
            out.print(f"{path}: {shown}", markup=False)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _read_plan(path: Path, operator_key: bytes) -> Plan:
    try:
        with path.open("rb") as file:
            data = file.read(wire.MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise PlanRefused(f"{path}: cannot be read ({error.strerror}), expected a plan file.") from None
    return wire.decode(SignedPlan, data).open(operator_key)


def main() -> None:
    """Run `hanse-client`."""
    commands.run(app)
