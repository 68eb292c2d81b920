"""The command `hanse-server`. Only `fit-whitening` needs torch, and only when it is called."""

import json
import os
import textwrap
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from PIL import Image

from hanse_common import commands, signing, wire
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.credentials import fingerprint
from hanse_common.errors import CatalogError, ConfigError, PhotoError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.league_card import LeagueCard
from hanse_common.plan import Plan, SignedPlan, noise_shares
from hanse_common.vision import photo
from hanse_common.wire import NAME
from hanse_server.config import ServerConfig, make_plan
from hanse_server.development_keys import CERTIFICATE_DAYS, make_keys
from hanse_server.optimizers import create

if TYPE_CHECKING:
    from hanse_server.daemon import Event, Tell

app = commands.new_app(
    "The operator's side of a Hanse league: make a signing key, see what a plan costs the merchants, and sign it. "
    "The server coordinates; it never sees a photo."
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Your configuration.", metavar="FILE")]
MIN_MERCHANTS = 3
"""With fewer, each would know the others' updates from the sum."""

MAX_PEM_BYTES = 60_000

DEFAULT_CONFIG = Path("hanse-server.yaml")


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="Where to write the signing key.", metavar="FILE")],
) -> None:
    """Make the key that signs plans. Give merchants the public half, FILE.pub; show the other to nobody."""
    key = signing.create_key(path)
    out.print(f"Wrote {path} (secret) and {path}.pub. Merchants pin this under operator_key:")
    out.print(signing.public_bytes(key).hex())


@app.command()
def check(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Check the configuration and show what its plan costs each merchant. Nothing is written."""
    settings = load(ServerConfig, config)
    create(settings.optimization.optimizer)
    _describe(make_plan(settings.plan, bytes(16)))


@app.command()
def sign(
    config: ConfigOption = DEFAULT_CONFIG,
    plan_file: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the plan.", metavar="FILE")
    ] = Path("plan.hanse"),
) -> None:
    """Sign the plan that the configuration describes, for merchants to judge (hanse-client explain)."""
    _require_new(plan_file)
    settings = load(ServerConfig, config)
    create(settings.optimization.optimizer)
    key = signing.load_key(settings.signing_key)
    plan = make_plan(settings.plan, os.urandom(16))
    write_atomically(plan_file, wire.encode(SignedPlan.sign(plan, key)), PUBLIC)
    _describe(plan)
    out.print(f"Signed as {plan.digest.hex()[:16]} in {plan_file}.")


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="Where to write them, a new folder.", metavar="FOLDER")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address by which merchants reach the server; may be repeated.", metavar="HOST"
        ),
    ] = None,
    merchant: Annotated[
        list[str] | None,
        typer.Option(help="A merchant to make keys for; may be repeated.", metavar="NAME"),
    ] = None,
    league: Annotated[
        str, typer.Option(help="The league's name, for the list of its members.", metavar="NAME")
    ] = "demo",
) -> None:
    """Make keys for trying a league out: an authority, the server's certificate, your token, merchants' keys.

    In production bring a certificate of your own, let merchants make their own keys (hanse-client init), and let
    others hold the league's key, which signs the list of members (hanse-client league).
    """
    names = merchant or []
    if len(set(names)) != len(names) or not all(NAME.fullmatch(name) for name in (*names, league)):
        raise ConfigError(
            "--merchant, --league: expected different names of lower-case letters, digits, dots, dashes and "
            "underscores."
        )
    if names and len(names) < MIN_MERCHANTS:
        raise ConfigError(f"--merchant: found {len(names)}, expected none or at least {MIN_MERCHANTS}.")
    hosts = tuple(host or ("localhost", "127.0.0.1", "::1"))
    made = make_keys(folder, hosts, tuple(names), league)
    out.print("Under service in hanse-server.yaml:", markup=False)
    lines: dict[str, Any] = {
        "tls": {
            "authority": str(made.authority),
            "certificate": str(made.certificate),
            "key": str(made.key),
        },
        "admin": {"token": str(made.token)},
    }
    if made.merchants:
        lines["directory"] = str(made.directory)
        lines["charter"] = made.pinned
    out.print(textwrap.indent(yaml.safe_dump(lines, sort_keys=False), "  ").rstrip(), markup=False)
    out.print(f"\nEvery merchant gets {made.authority}, and nobody else's keys.", markup=False)
    for own in made.merchants.values():
        out.print(f"  {own} is for its merchant: identity.key and node.key are secret.", markup=False)
    out.print(
        f"The certificate is good for {CERTIFICATE_DAYS} days. The authority's own key was dropped, so nobody can "
        "sign another with it.",
        markup=False,
    )


@app.command()
def card(
    config: ConfigOption = DEFAULT_CONFIG,
    card_file: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the card.", metavar="FILE")
    ] = Path("league.yaml"),
) -> None:
    """Write the league's card, with which a merchant sets itself up (hanse-client init). Nothing in it is secret."""
    settings = load(ServerConfig, config)
    if settings.service is None:
        raise ConfigError("service: missing; expected a section with the charter, tls, …")
    service = settings.service
    host = service.aggregator.address.rpartition(":")[0]
    authority = read_bounded(service.tls.authority, MAX_PEM_BYTES, "a PEM certificate", ConfigError)
    fingerprint(authority)
    made = LeagueCard(
        league=settings.plan.league,
        charter=service.charter,
        operator_key=signing.load_public(
            settings.signing_key.with_name(settings.signing_key.name + ".pub")
        ).hex(),
        server=f"{host}:{service.fleet.port}",
        authority=authority.decode("ascii", "replace"),
        taxonomy=settings.plan.taxonomy,
    )
    write_atomically(card_file, made.to_yaml().encode(), PUBLIC)
    out.print(
        f"Wrote {card_file}. Its words, for merchants to compare with each other:\n\n  {made.words()}",
        markup=False,
    )


@app.command()
def run(
    config: ConfigOption = DEFAULT_CONFIG,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training that the state folder holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Train the signed plan with the merchants of your league, publish the recognizer, and end.

    Stopped or killed, it goes on after the last finished round with --resume.

    Exit codes: 0 published, 16 a round failed for good, 18 stopped.
    """
    from hanse_server.daemon import Daemon  # Flower takes seconds to load

    daemon = Daemon(load(ServerConfig, config), _teller(as_json))
    with commands.until_stopped() as stop:
        daemon.train(stop, resume=resume)


@app.command()
def serve(
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Wait for merchants, and train when `flwr run` says so, until you stop it."""
    from hanse_server.daemon import Daemon

    daemon = Daemon(load(ServerConfig, config), _teller(as_json))
    with commands.until_stopped() as stop:
        daemon.serve(stop)


@app.command()
def fit_whitening(
    photos: Annotated[Path, typer.Argument(help="Folder of public photos, searched.", metavar="PHOTOS")],
    dimensions: Annotated[int, typer.Option(help="Numbers that a photo becomes.", min=1, max=1 << 14)] = 192,
    whitening_file: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the whitening.", metavar="FILE")
    ] = Path("whitening.safetensors"),
    config: ConfigOption = DEFAULT_CONFIG,
    limit: Annotated[
        int, typer.Option(help="Use at most this many photos, spread evenly over the sorted paths.", min=1)
    ] = 10_000,
    weights: Annotated[
        Path | None, typer.Option(help="Local file of the backbone's weights.", metavar="FILE")
    ] = None,
) -> None:
    """Fit the recipe's whitening to public reference photos, without labels. Then sign a plan that names it.

    The photos must be nobody's secret: what is fitted to them is given to every merchant.
    """
    from hanse_server.whitening import fit_whitening as fit  # torch takes seconds to load

    _require_new(whitening_file)
    recipe = load(ServerConfig, config).plan.recipe
    paths = _photo_files(photos)
    taken = paths[:: -(-len(paths) // limit)]
    with out.status(f"looking at {len(taken)} photos"):
        fitted = fit(recipe, _decoded(taken), dimensions, weights)
    write_atomically(whitening_file, fitted.file, PUBLIC)
    out.print(
        f"Wrote {whitening_file}, fitted to {fitted.photos} of {len(paths)} files. Give it to every merchant."
    )
    out.print("In your configuration, put these lines under plan.recipe.backbone (and no projection):")
    out.print(f"  whitening:\n    dimensions: {dimensions}\n    weights: {fitted.name.weights}", markup=False)


def _photo_files(folder: Path) -> list[Path]:
    """Return the files below `folder`, sorted, but for hidden ones. Raises `CatalogError` without any."""
    if not folder.is_dir():
        raise CatalogError(f"{folder}: no such folder, expected one with public photos.")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    shown = [path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    if not shown:
        raise CatalogError(f"{folder}: holds no files, expected public photos.")
    return shown


def _decoded(paths: list[Path]) -> Iterator[Image.Image]:
    """Yield the photos that can be decoded; name the others."""
    for path in paths:
        try:
            yield photo.decode(path)
        except PhotoError as error:
            commands.err.print(f"left out: {error}", markup=False)


def _require_new(path: Path) -> None:
    """Raise `ConfigError` unless the file `path` can be made: found out before the work, not after it."""
    if path.exists():
        raise ConfigError(f"{path}: there is a file already; move it away or name another.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first.")


def _teller(as_json: bool) -> "Tell":
    """Return what prints the daemon's events: lines with the time for people, JSON for programs."""

    def tell(event: "Event") -> None:
        if as_json:
            typer.echo(json.dumps({"kind": event.kind, "text": event.text} | event.facts))
        else:
            out.print(f"{datetime.now():%H:%M:%S}  {event.text}", markup=False)

    return tell


def _describe(plan: Plan) -> None:
    training, most = plan.training, plan.cohort.max_merchants
    epsilon = plan.epsilon()
    repeats = f" (and up to {training.repeats} repeated)" if training.repeats else ""
    count = noise_shares(training, plan.cohort)
    shares = f", in {count} shares of honest merchants" if count > 1 else ""
    lines = (
        ("league", plan.league),
        ("classes", ", ".join(plan.taxonomy.classes)),
        ("trained numbers", f"{plan.dimension:,}, so an upload of {4 * plan.dimension / 1e6:.2f} MB a round"),
        ("rounds", f"{training.rounds}{repeats}, mode {training.mode}"),
        ("steps a round", str(training.steps_per_round)),
        ("each merchant pays", f"ε = {epsilon:.3f} at δ = {plan.delta:g}, for any one {training.unit}"),
        (
            "noise multiplier",
            f"{training.noise_multiplier:.3f} at sampling rate {training.sampling_rate:g}{shares}",
        ),
        (
            "a round needs",
            f"{plan.cohort.min_merchants} merchants, takes at most {plan.cohort.max_merchants}",
        ),
        ("masking", f"holds against {plan.cohort.max_corrupt} corrupt members of the league"),
        ("of a full cohort", f"{plan.cohort.parameters.dropouts(most)} of {most} may drop out of a round"),
    )
    for name, text in lines:
        out.print(f"{name + ':':20}{text}", markup=False)


def main() -> None:
    """Run `hanse-server`."""
    commands.run(app)
