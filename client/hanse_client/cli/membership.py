"""Becoming a member and staying one: `init`, `join`, `endorse`, `rotate`, `members`."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, confirmed, say
from hanse_client.config import ClientConfig
from hanse_client.enrolment import Answers, enrol, finish_rotation, request, rotation
from hanse_client.keys import load_identity
from hanse_client.markers import Markers
from hanse_common.config import load
from hanse_common.errors import ConfigError, SignatureInvalid, WireError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.fingerprint import words
from hanse_common.league_card import LeagueCard
from hanse_common.membership import MAX_REQUEST_BYTES, SignedRequest
from hanse_common.vision.photo import shown

YesOption = Annotated[bool, typer.Option("--yes", help="Say yes to every question; for scripts.")]
RequestArgument = Annotated[
    Path, typer.Argument(help="The file with the request's lines; - reads them from here.", metavar="REQUEST")
]


def init(
    card: Annotated[Path, typer.Argument(help="The league's card, from its operator.", metavar="LEAGUE")],
    photos: Annotated[Path | None, typer.Option(help="Your photos.", metavar="FOLDER")] = None,
    name: Annotated[str | None, typer.Option(help="Your name in the league.", metavar="NAME")] = None,
    entity: Annotated[str | None, typer.Option(help="Your business.", metavar="TEXT")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The most ε you allow in all.")] = None,
    folder: Annotated[Path, typer.Option(help="Where to write everything.", metavar="FOLDER")] = Path(),
    passphrase: Annotated[
        bool | None,
        typer.Option("--passphrase/--no-passphrase", help="Whether your keys get a passphrase."),
    ] = None,
    yes: YesOption = False,
) -> None:
    """Set your shop up for a league: some questions, then a configuration that explains itself, and your keys."""
    league = load(LeagueCard, card)
    classes = ", ".join(league.taxonomy.classes)
    say(f"The league {league.league} tells apart {len(league.taxonomy.classes)} classes: {classes}.")
    say(f"Its server is {league.server}. The card's words:\n\n  {league.words()}\n")
    say(
        "Somebody could have given you a card of a league of their own. Ask a member whom you know, by telephone or in"
    )
    say("person, to read out the words of theirs (hanse-client words).")
    if not confirmed("Are they the same?", yes):
        raise ConfigError(f"{shown(card)}: its words were not confirmed, so nothing was written.")
    asks = photos is None or name is None or entity is None or epsilon is None
    photos = photos or Path(typer.prompt("\nWhere are your photos (a folder, or a CSV file)?"))
    name = name or typer.prompt("Your name in the league (small letters and dashes)")
    entity = entity or typer.prompt("The business or person behind it")
    if epsilon is None:
        say(
            "\nε bounds what anybody can ever learn about any one photo of yours. At 1 a suspicion of 1 % can grow to"
        )
        say("2.7 %, at 3 to 17 %, at 8 to 97 %.")
        epsilon = float(typer.prompt("The most ε that you allow in all", default=3.0, type=float))
    if passphrase is None:
        passphrase = asks and typer.confirm("Protect your keys with a passphrase?", default=False)
    secret = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True) if passphrase else ""
    settings = enrol(league, Answers(photos, name, entity, epsilon, secret.encode()), folder)
    config = folder / DEFAULT_CONFIG
    say(f"\nWrote {shown(config)}, which explains every setting, and your keys:")
    say(f"  {shown(settings.identity_path)} is who you are in the league. Back it up, show it to nobody.")
    say(f"  {shown(settings.node_key_path)} opens the connection to the server. The same goes for it.")
    say(
        "\nWhat next:\n  hanse-client catalog   looks through your photos\n  hanse-client join      asks to be a member"
    )


def show_words(
    card: Annotated[Path, typer.Argument(help="The league's card.", metavar="LEAGUE")],
) -> None:
    """Show the words of a league's card, to be compared with another's over the telephone."""
    say(load(LeagueCard, card).words())


def join(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Ask to become a member: prints some lines to be mailed, and the words to be compared over the telephone."""
    _print_request(request(load(ClientConfig, config)), config)


def rotate(
    config: ConfigOption = DEFAULT_CONFIG,
    finish: Annotated[
        bool, typer.Option("--finish", help="Use the new identity; once the league lists it.")
    ] = False,
) -> None:
    """Change your identity: makes the next one and asks the league to list it in the old one's place.

    Until it is listed you take part with the old one. Then call this again with --finish.
    """
    settings = load(ClientConfig, config)
    if finish:
        old = finish_rotation(settings)
        say(f"From now on you are the new identity. The old one is in {shown(old)}.")
        return
    _print_request(rotation(settings), config)
    say("Once the league lists it: hanse-client rotate --finish")


def endorse(asked: RequestArgument, config: ConfigOption = DEFAULT_CONFIG, yes: YesOption = False) -> None:
    """Vouch for a merchant that asks to be a member, after you compared words with it.

    The request's file then has your word in it, too.
    """
    settings = load(ClientConfig, config)
    found = read_request(asked)
    if found.request.charter.hex() != settings.league.charter:
        raise SignatureInvalid(f"{asked}: asks for another league than yours.")
    for line in describe_request(found):
        say(line)
    say(
        "\nAsk this merchant, by telephone or in person, to read out these words. Your signature says that it is who"
    )
    say("it says, one business of its own, and not one more name of a member or of the operator.")
    if not confirmed("Are the words the same, and do you vouch for it?", yes):
        raise ConfigError(f"{asked}: not endorsed.")
    endorsed = found.endorsed_by(load_identity(settings))
    if str(asked) == "-":
        typer.echo(endorsed.to_text())
        return
    write_atomically(asked, endorsed.to_text().encode(), PUBLIC)
    count = len(endorsed.endorsements)
    say(
        f"\n{shown(asked)} now has the word of {count} member{'s' if count > 1 else ''}. Send it back, or on."
    )


def members(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Show who is in the league, as your daemon saw its directory last."""
    settings = load(ClientConfig, config)
    seen = None
    if settings.markers_path.exists():
        seen = Markers(settings.markers_path).directory(bytes.fromhex(settings.league.charter))
    if seen is None:
        say("Your daemon has not seen the league's directory yet; it comes with the first training.")
        return
    say(f"The directory of {seen.league}, version {seen.version}, good until {_date(seen.expires)}:\n")
    verified = {identity: name for name, identity in settings.policy.verified.items()}
    for entry in seen.entries:
        known = "  (you verified it)" if entry.identity.hex() in verified else ""
        say(f"{entry.name}: {entry.entity}, until {_date(entry.expires)}{known}\n  {entry.identity.hex()}")
        say(f"  {words(entry.identity)}")


def read_request(path: Path) -> SignedRequest:
    """Return the request in the file `path`, or on standard input for -, once every signature in it verifies.

    Raises `WireError`, `SignatureInvalid`, `ConfigError`.
    """
    if str(path) == "-":
        data = sys.stdin.buffer.read(4 * MAX_REQUEST_BYTES)
    else:
        data = read_bounded(path, 4 * MAX_REQUEST_BYTES, "a request to be a member", ConfigError)
    try:
        found = SignedRequest.from_text(data.decode("utf-8", "replace"))
        found.require_sound()
    except WireError as error:
        raise WireError(f"{path}: {error} Ask its sender for it again.") from None
    except SignatureInvalid:
        raise SignatureInvalid(f"{path}: a signature in it does not verify. Take it for a forgery.") from None
    return found


def describe_request(asked: SignedRequest) -> list[str]:
    """Return lines that say who asks for what."""
    wanted = asked.request
    return [
        f"{wanted.name} asks to be a member. Behind it: {wanted.entity}",
        *(
            ["It is one already and changes its identity; the old one signed this, too."]
            if wanted.replaces
            else []
        ),
        f"Members that vouch for it so far: {len(asked.endorsements)}",
        f"Words:\n\n  {words(wanted.digest)}",
    ]


def _print_request(asked: SignedRequest, config: Path) -> None:
    path = config.parent / f"{asked.request.name}.request"
    write_atomically(path, asked.to_text().encode(), PUBLIC)
    typer.echo(asked.to_text())
    say(f"These lines are in {shown(path)}, too. Send them to members who know you; each vouches with")
    say(f"hanse-client endorse {path.name}. Then they go to those who hold the league's key.")
    say(f"When they call, read out these words:\n\n  {words(asked.request.digest)}\n")


def _date(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%d %B %Y}" if seconds < 1 << 36 else "for good"
