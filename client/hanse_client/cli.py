"""The command `hanse-client`."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hanse_client import ledger_view
from hanse_client.charges import Charge
from hanse_client.config import ClientConfig
from hanse_client.ledger import Ledger
from hanse_client.member_list import MemberList
from hanse_common import commands, signing, wire
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.credentials import create_node_key
from hanse_common.directory import SignedDirectory
from hanse_common.errors import ConfigError, PhotoError, PlanRefused, SignatureInvalid, WireError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision.photo import decode, shown

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
    problems: Annotated[
        int, typer.Option(help="How many unusable photos to list.", min=0, metavar="NUMBER")
    ] = 20,
) -> None:
    """Look through your photos: how many of each class, which labels have no class, which files are unusable.

    Nothing is sent and nothing is spent.
    """
    from hanse_client.shop import Shop  # torch takes seconds to load, and --help should not

    settings = load(ClientConfig, config)
    with out.status("reading photos"):
        found = Shop(settings).catalog()
    table = Table("class", "to train on", "held out", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for index, name in enumerate(settings.league.taxonomy.classes):
        counts = [sum(r.label == index for r in side) for side in (found.train, found.holdout)]
        table.add_row(escape(name), *(str(count) for count in counts))
    table.add_row("all", str(len(found.train)), str(len(found.holdout)), style="bold")
    out.print(table)
    if found.unmapped:
        where = settings.labels or f"a file that {config} names under labels"
        _say(
            f"\nThese labels have no class of the league, so their photos are not used. Map them in {where}:"
        )
        for label, count in found.unmapped.items():
            _say(f"  {label!r}: {_photos(count)}")
    if found.problems:
        _say(f"\n{_photos(len(found.problems))} can't be used:")
        for problem in found.problems[:problems]:
            _say(f"  {problem.reason}")
        if len(found.problems) > problems:
            _say(f"  ... and {len(found.problems) - problems} more (--problems NUMBER lists more)")


@app.command()
def keygen(
    config: ConfigOption = DEFAULT_CONFIG,
    name: Annotated[str, typer.Option(help="Your name in the league.", metavar="NAME")] = "your-name",
) -> None:
    """Make your keys: your identity's, for the league's directory, and your node's, for the operator."""
    settings = load(ClientConfig, config)
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (settings.identity_path, settings.node_key_path):
        if path.exists():
            raise ConfigError(f"{path}: there is a key already; move it away to make another.")
    identity = signing.create_key(settings.identity_path)
    create_node_key(settings.node_key_path)
    public = settings.node_key_path.with_name(settings.node_key_path.name + ".pub")
    _say(f"Wrote {shown(settings.identity_path)} and {shown(settings.node_key_path)}: secret, back them up.")
    _say("\nFor the league's directory, give these lines to whoever holds the league's key:")
    _say(f"  {name}:\n    entity: Your Shop Ltd\n    identity: {signing.public_bytes(identity).hex()}")
    _say(f"\nGive the operator the file {shown(public)} and these lines:")
    _say(f"  {name}:\n    node_key: {public.name}")


@app.command()
def sign_directory(
    members: Annotated[Path, typer.Argument(help="Who is a member, YAML.", metavar="MEMBERS")],
    key: Annotated[
        Path, typer.Option(help="The league's secret key; made when missing.", metavar="FILE")
    ] = Path("league.key"),
    directory_file: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the directory.", metavar="FILE")
    ] = Path("directory.hanse"),
) -> None:
    """Sign the list of the league's members. For the member who holds the league's key, never for the operator.

    MEMBERS says league, version (higher each time), days until it expires, and under members, for each name, the
    entity behind it and its identity, as hanse-client keygen printed it.
    """
    listed = load(MemberList, members)
    directory = listed.directory(datetime.now(UTC))
    secret = signing.load_key(key) if key.exists() else signing.create_key(key)
    write_atomically(directory_file, wire.encode(SignedDirectory.sign(directory, secret)), PUBLIC)
    expires = datetime.fromtimestamp(directory.expires, UTC)
    _say(
        f"Wrote {shown(directory_file)}: version {directory.version}, {len(directory.entries)} members, good until "
        f"{expires:%d %B %Y}. The operator needs this file."
    )
    _say(f"Everyone pins this key as league_key: {signing.public_bytes(secret).hex()}")


@app.command()
def run(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Take part in your league until you stop it: wait for trainings, judge them, train, keep the accounts."""
    from hanse_client.daemon import Daemon  # torch takes seconds to load

    with commands.until_stopped() as stop:
        with Daemon(load(ClientConfig, config), _say_now) as daemon:
            daemon.run(stop)
        _say_now("Stopped.")


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="The plan file the operator gave you.", metavar="PLAN")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Say in plain words what a plan would do with your photos, and whether you allow it.

    PLAN is the file that the operator gave you. No photo is read, and nothing is spent.

    Exit codes: 0 allowed, 3 refused by your policy, 4 no room in your budget, 12 not signed by your operator.
    """
    settings = load(ClientConfig, config)
    found = _read_plan(plan, bytes.fromhex(settings.league.operator_key))
    _say("\n".join(settings.policy.explain(found)))
    reasons = settings.policy.reasons(found, settings.league.taxonomy)
    if reasons:
        out.print("\n[red]Your policy refuses this plan:[/red]")
        _say("\n".join(f"- {reason}" for reason in reasons))
        raise typer.Exit(PlanRefused.exit_code)
    _require_budget(settings, found)
    out.print("\n[green]Your policy allows this plan, and your budget has room for it.[/green]")


@app.command()
def ledger(
    config: ConfigOption = DEFAULT_CONFIG,
    entries: Annotated[bool, typer.Option("--entries", help="Also list every entry, oldest first.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it again, and show its length and last hash.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Write every entry to a new file, a line of JSON each, so that others can check chain and ε.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Show what your photos have paid, what that means, and how much of your budget is left.

    An exported FILE has a JSON object for each entry; client/README.md says how to check the chain and ε with it.

    Exit codes: 0 the ledger is sound, 13 it is damaged.
    """
    settings = load(ClientConfig, config)
    if not settings.ledger_path.exists():
        _say(
            f"{shown(settings.ledger_path)}: no ledger yet. Nothing was ever charged from here. If you did take part "
            "before, the ledger was moved or deleted: find it before you go on."
        )
        return
    kept = _open_ledger(settings)
    if verify:
        _say("\n".join(ledger_view.verified(kept)))
    if export is not None:
        written = ledger_view.export(kept, export)
        _say(
            f"Wrote {shown(export)}: {written} entries. It tells when you took part, and nothing of your photos."
        )
    if entries:
        _say("".join(f"{ledger_view.entry(event)}\n" for event in kept.events()))
    if verify or export is not None:
        return
    spent = kept.spent()
    _say("\n".join(ledger_view.summary(kept, spent, settings.policy)))
    if spent.plans:
        out.print()
        out.print(ledger_view.table(kept, spent))
    _say(f"\nEntries in the ledger: {kept.counter}. None is altered or out of order.")


@app.command()
def classify(
    photos: Annotated[list[Path], typer.Argument(help="Photos to classify.", metavar="PHOTO...")],
    recognizer: Annotated[
        Path | None,
        typer.Option(
            "--recognizer",
            "-r",
            help="Folder of the recognizer, if not your configuration's.",
            metavar="FOLDER",
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    top: Annotated[int, typer.Option(help="How many classes to show.", min=1, metavar="NUMBER")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each photo.")] = False,
) -> None:
    """Say what is on each photo, and how sure the recognizer is.

    A photo that can't be used is named, and the others are classified all the same.

    Exit codes: 0 all classified, 21 no such file, 22 not a photo or damaged, 23 too large (of the first such).
    """
    from hanse_common.vision.recognizer import Recognizer

    if recognizer is not None:
        model = Recognizer.load(recognizer)
    else:
        settings = load(ClientConfig, config)
        if settings.recognizer is None:
            raise ConfigError(f"{config}: recognizer: missing; name its folder there, or with --recognizer.")
        model = Recognizer.load(settings.recognizer, backbone_weights=settings.backbone_weights)
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
            typer.echo(json.dumps({"photo": str(path), "probabilities": dict(ranked)}))
        else:
            named = ", ".join(f"{name} {100 * share:.1f} %" for name, share in ranked[:top])
            _say(f"{shown(path)}: {named}")
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _say(text: str) -> None:
    """Print `text` as it is: names may look like rich's markup or emoji codes."""
    out.print(text, markup=False, emoji=False)


def _say_now(text: str) -> None:
    """Print `text` with the time; a daemon's lines are read later."""
    _say(f"{datetime.now():%H:%M:%S}  {text}")


def _photos(count: int) -> str:
    return "1 photo" if count == 1 else f"{count} photos"


def _read_plan(path: Path, operator_key: bytes) -> Plan:
    name = shown(path)
    data = read_bounded(path, wire.MAX_DOCUMENT_BYTES, "a plan file", ConfigError)
    try:
        return wire.decode(SignedPlan, data).open(operator_key)
    except WireError as error:
        raise WireError(f"{name}: not a plan file. {error} Ask the operator for it again.") from None
    except SignatureInvalid:
        raise SignatureInvalid(
            f"{name}: not signed with the key under league.operator_key. Take it for a forgery until the "
            "operator, asked by telephone, says otherwise."
        ) from None


def _open_ledger(settings: ClientConfig) -> Ledger:
    return Ledger(settings.ledger_path, settings.policy.budget)


def _require_budget(settings: ClientConfig, plan: Plan) -> None:
    """Raise `BudgetExceeded` unless the plan is in the ledger already or fits beside what is there."""
    if not settings.ledger_path.exists():
        return
    kept = _open_ledger(settings)
    if kept.last_work(plan.digest) is None:
        kept.check(Charge.of(plan))


def main() -> None:
    """Run `hanse-client`."""
    commands.run(app)
