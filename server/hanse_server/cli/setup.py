"""Setting up: `keys` to try things out, `card` for merchants that want to join."""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from hanse_common import signing
from hanse_common.commands import out
from hanse_common.credentials import fingerprint
from hanse_common.errors import ConfigError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.league_card import LeagueCard
from hanse_common.wire import NAME
from hanse_server.cli.options import DEFAULT_CONFIG, ConfigOption, settings_of
from hanse_server.development_keys import CERTIFICATE_DAYS, make_keys

MIN_MERCHANTS = 3
"""With fewer, each would know the others' updates from the sum."""

MAX_PEM_BYTES = 60_000


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


def card(
    config: ConfigOption = DEFAULT_CONFIG,
    card_file: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the card.", metavar="FILE")
    ] = Path("league.yaml"),
) -> None:
    """Write the league's card, with which a merchant sets itself up (hanse-client init). Nothing in it is secret."""
    settings, service = settings_of(config)
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
