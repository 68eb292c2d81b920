"""For those who hold the league's key, never for the operator: `hanse-client league …`."""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import ValidationError

from hanse_client.cli.membership import describe_request, read_request
from hanse_client.cli.options import confirmed, say
from hanse_client.keys import ask
from hanse_common import commands, signing, wire
from hanse_common.charter import Charter, CharterFile, SignedCharter, follow
from hanse_common.directory import (
    MAX_DIRECTORY_BYTES,
    MAX_FORMER,
    Directory,
    Entry,
    SignedDirectory,
    require_admitted,
)
from hanse_common.errors import ConfigError, SignatureInvalid, WireError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.fingerprint import words
from hanse_common.membership import SignedRequest
from hanse_common.vision.photo import shown
from hanse_common.wire import NAME

app = commands.new_app(
    "The league's key: who is a member. For the members who hold it together, never for the operator. Files go from "
    "one holder to the next by mail, and nothing in them is secret but the keys."
)

T = TypeVar("T")

CHARTER, DIRECTORY = Path("charter.hanse"), Path("directory.hanse")
MAX_FILE_BYTES = 2 * MAX_DIRECTORY_BYTES
DEFAULT_DAYS = 90

KeyOption = Annotated[Path, typer.Option(help="Your secret half of the league's key.", metavar="FILE")]
CharterOption = Annotated[Path, typer.Option("--charter", help="The league's charter.", metavar="FILE")]
DirectoryOption = Annotated[Path, typer.Option("--directory", help="The directory now.", metavar="FILE")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Where to write the next one.", metavar="FILE")]
DaysOption = Annotated[int, typer.Option(help="How long it holds: a removed member is one until then at the latest.",
                                         min=1, max=400)]  # fmt: skip
HolderOption = Annotated[
    list[Path], typer.Option("--holder", help="A holder's public half, FILE.pub; repeat it.", metavar="FILE")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Say yes to every question; for scripts.")]


@app.command()
def key(path: Annotated[Path, typer.Argument(help="Where to write it.", metavar="FILE")]) -> None:
    """Make your half of the league's key. Keep it off the machine of your daemon, best on a stick in a drawer."""
    passphrase = ""
    if typer.confirm("Protect it with a passphrase?", default=True):
        passphrase = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True)
    made = signing.create_key(path, passphrase.encode())
    say(f"Wrote {shown(path)}, secret, and {shown(path)}.pub, for whoever writes the charter.")
    say(f"Its words:\n\n  {words(signing.public_bytes(made))}")


@app.command()
def found(
    league: Annotated[str, typer.Argument(help="The league's name.", metavar="NAME")],
    holder: HolderOption,
    threshold: Annotated[int, typer.Option(help="How many holders must sign.", min=1)],
    endorsements: Annotated[
        int, typer.Option(help="How many members must vouch for a new one.", min=0, max=4)
    ] = 2,
    charter: CharterOption = CHARTER,
) -> None:
    """Write the founding charter: who holds the league's key, and how many of them must sign. Then each signs it."""
    if not NAME.fullmatch(league):
        raise ConfigError(
            f"{league}: expected a name of lower-case letters, digits, dots, dashes, underscores."
        )
    _require_new(charter)
    holders = tuple(sorted(map(signing.load_public, holder)))
    made = _valid(lambda: Charter(
        league=league, version=1, holders=holders, threshold=threshold, endorsements=endorsements
    ))  # fmt: skip
    _write(charter, CharterFile(charters=(SignedCharter.of(made),)))
    _describe_charter(made)
    say(
        f"\nWrote {shown(charter)}. {threshold} of {len(holders)} holders must sign it: hanse-client league sign."
    )


@app.command()
def succeed(
    holder: HolderOption,
    threshold: Annotated[int, typer.Option(help="How many holders must sign.", min=1)],
    endorsements: Annotated[
        int, typer.Option(help="How many members must vouch for a new one.", min=0, max=4)
    ] = 2,
    charter: CharterOption = CHARTER,
    target: OutOption = Path("charter.next.hanse"),
) -> None:
    """Write the charter that follows, with other holders: when a key is lost or stolen, or a holder leaves.

    It needs the signatures of as many old holders as the charter asks for, and of as many of the new ones.
    """
    _require_new(target)
    chain = _read_charters(charter)
    before = _follow(charter, chain)
    if endorsements < before.endorsements:
        raise ConfigError(
            f"--endorsements: found {endorsements}, expected {before.endorsements} or more, as before: members would "
            "refuse a charter by which holders do without their word."
        )
    holders = tuple(sorted(map(signing.load_public, holder)))
    made = _valid(lambda: before.succeeded_by(holders, threshold, endorsements))
    _write(target, CharterFile(charters=(*chain, SignedCharter.of(made))))
    _describe_charter(made)
    say(f"\nWrote {shown(target)}. Holders of both charters must sign it: hanse-client league sign.")


@app.command()
def admit(
    requests: Annotated[
        list[Path], typer.Argument(help="Who asks, with endorsements.", metavar="REQUEST...")
    ],
    charter: CharterOption = CHARTER,
    directory: DirectoryOption = DIRECTORY,
    target: OutOption = Path("directory.next.hanse"),
    days: DaysOption = DEFAULT_DAYS,
    yes: YesOption = False,
) -> None:
    """Write the next directory with new members in it. Without a directory yet, these are the founders."""
    asked = [read_request(path) for path in requests]
    chain, rules, now = _league(charter)
    before = _read_directory(directory, rules) if directory.exists() else None
    for path, one in zip(requests, asked, strict=True):
        if one.request.charter != chain[0].read().digest:
            raise SignatureInvalid(f"{path}: asks for another league than this charter's.")
        say("\n".join(describe_request(one)) + "\n")
    if not confirmed("Did you compare these words, and may they be members?", yes):
        raise ConfigError("Nothing was written.")
    expires = _expires(now, days)
    new = [Entry.of(_counted(one, before), expires) for one in asked]
    leaving = {entry.replaces for entry in new} | {entry.identity for entry in new}
    kept = [entry for entry in (before.entries if before else ()) if entry.identity not in leaving]
    made = _next(rules, before, [*kept, *new], expires)
    gone = {entry.identity for entry in before.former} if before else set()
    require_admitted(made, follow(chain, chain[0].read().digest), before, gone)
    _offer(made, chain, target, rules)


@app.command()
def remove(
    names: Annotated[list[str], typer.Argument(help="Who leaves.", metavar="NAME...")],
    charter: CharterOption = CHARTER,
    directory: DirectoryOption = DIRECTORY,
    target: OutOption = Path("directory.next.hanse"),
    days: DaysOption = DEFAULT_DAYS,
) -> None:
    """Write the next directory without some members: who left, or whose key was stolen."""
    chain, rules, now = _league(charter)
    before = _read_directory(directory, rules)
    unknown = set(names) - {entry.name for entry in before.entries}
    if unknown:
        raise ConfigError(f"{directory}: found no {', '.join(sorted(unknown))} in it.")
    kept = [entry for entry in before.entries if entry.name not in names]
    _offer(_next(rules, before, kept, _expires(now, days)), chain, target, rules)


@app.command()
def renew(
    charter: CharterOption = CHARTER,
    directory: DirectoryOption = DIRECTORY,
    target: OutOption = Path("directory.next.hanse"),
    days: DaysOption = DEFAULT_DAYS,
) -> None:
    """Write the next directory with the same members, good for longer, or under a charter that follows."""
    chain, rules, now = _league(charter)
    before = _read_directory(directory, rules)
    expires = _expires(now, days)
    kept = [entry.model_copy(update={"expires": expires}) for entry in before.entries]
    _offer(_next(rules, before, kept, expires), chain, target, rules)


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(help="A charter or a directory.", metavar="FILE")],
    key: KeyOption = Path("league.key"),
    yes: YesOption = False,
) -> None:
    """Add your signature to a charter or a directory, after you have read what it says."""
    found = _read(file)
    _show(found)
    if not confirmed("\nDo you sign this?", yes):
        raise ConfigError(f"{file}: not signed.")
    secret = signing.load_key(key, ask)
    if isinstance(found, CharterFile):
        *before, last = found.charters
        found = CharterFile(charters=(*before, last.signed_by(secret)))
    else:
        found = found.signed_by(secret)
    _write(file, found)
    say(f"\nSigned {shown(file)}. {_missing(found)}")


@app.command()
def show(file: Annotated[Path, typer.Argument(help="A charter or a directory.", metavar="FILE")]) -> None:
    """Show what a charter or a directory says, and whether enough holders signed it."""
    found = _read(file)
    _show(found)
    say(f"\n{_missing(found)}")


def _league(path: Path) -> tuple[tuple[SignedCharter, ...], Charter, datetime]:
    chain = _read_charters(path)
    return chain, _follow(path, chain), datetime.now(UTC)


def _follow(path: Path, chain: Sequence[SignedCharter]) -> Charter:
    try:
        return follow(chain, chain[0].read().digest)[-1]
    except SignatureInvalid as error:
        raise SignatureInvalid(
            f"{path}: {error} Let the others sign it first: hanse-client league sign."
        ) from None


def _read(path: Path) -> CharterFile | SignedDirectory:
    data = read_bounded(path, MAX_FILE_BYTES, "a charter or a directory", ConfigError)
    try:
        found = wire.decode_any((CharterFile, SignedDirectory), data)
    except WireError as error:
        raise WireError(f"{path}: {error} Get it again from where it came.") from None
    if not isinstance(found, CharterFile | SignedDirectory):
        raise WireError(f"{path}: found neither a charter nor a directory.")
    return found


def _read_charters(path: Path) -> tuple[SignedCharter, ...]:
    found = _read(path)
    if not isinstance(found, CharterFile):
        raise ConfigError(f"{path}: found a directory, expected a charter.")
    return found.charters


def _read_directory(path: Path, rules: Charter) -> Directory:
    found = _read(path)
    if not isinstance(found, SignedDirectory):
        raise ConfigError(f"{path}: found a charter, expected a directory.")
    directory = found.read()
    before = found.follow(found.charters[0].read().digest)[-1]
    before.require_signed(SignedDirectory.DOMAIN, found.directory, found.signatures)
    if directory.league != rules.league:
        raise ConfigError(f"{path}: found the directory of {directory.league}, expected {rules.league}'s.")
    return directory


def _next(rules: Charter, before: Directory | None, entries: Iterable[Entry], expires: int) -> Directory:
    """Return the directory that follows `before`: with these entries, and those that left among the former ones."""
    kept = tuple(sorted(entries, key=lambda entry: entry.name))
    staying = {entry.identity for entry in kept}
    left = [entry for entry in (before.entries if before else ()) if entry.identity not in staying]
    former = [*(before.former if before else ()), *(entry for entry in left if entry.proof)]
    return _valid(lambda: Directory(
        league=rules.league,
        charter=rules.digest,
        version=1 if before is None else before.version + 1,
        expires=expires,
        entries=kept,
        former=tuple(former[-MAX_FORMER:]),
    ))  # fmt: skip


def _counted(asked: SignedRequest, before: Directory | None) -> SignedRequest:
    """Return the request with the endorsements of members alone: those of others count for nothing."""
    members = set(before.identities().values()) if before else set()
    kept = tuple(one for one in asked.endorsements if one.identity in members)
    return asked.model_copy(update={"endorsements": kept})


def _offer(made: Directory, chain: Sequence[SignedCharter], target: Path, rules: Charter) -> None:
    _require_new(target)
    _write(target, SignedDirectory.of(made, chain))
    _describe_directory(made)
    say(
        f"\nWrote {shown(target)}. {rules.threshold} holders must sign it: hanse-client league sign {target.name}"
    )
    say("Then it goes to the operator, in the place of the one before.")


def _show(found: CharterFile | SignedDirectory) -> None:
    if isinstance(found, CharterFile):
        _describe_charter(found.charters[-1].read())
        say(f"What members pin: {found.charters[0].read().digest.hex()}")
    else:
        _describe_directory(found.read())


def _describe_charter(charter: Charter) -> None:
    say(
        f"Charter {charter.version} of {charter.league}: {charter.threshold} of {len(charter.holders)} holders sign;"
    )
    say(f"{charter.endorsements} members must vouch for a new one. The holders' words:")
    for holder in charter.holders:
        say(f"  {words(holder)}")
    say(f"The charter's own words:\n\n  {words(charter.digest)}\n")


def _describe_directory(directory: Directory) -> None:
    until = datetime.fromtimestamp(directory.expires, UTC)
    say(f"Directory {directory.version} of {directory.league}, good until {until:%d %B %Y}:")
    for entry in directory.entries:
        say(
            f"  {entry.name}: {entry.entity} (vouched for by {len(entry.endorsements)})\n    {words(entry.identity)}"
        )


def _missing(found: CharterFile | SignedDirectory) -> str:
    """Return in words how many signatures there still must be."""
    chain = found.charters
    last = chain[-1].read()
    if isinstance(found, CharterFile):
        domain, data, signatures = SignedCharter.DOMAIN, chain[-1].charter, chain[-1].signatures
        needed = [last, *([chain[-2].read()] if len(chain) > 1 else [])]
    else:
        domain, data, signatures, needed = SignedDirectory.DOMAIN, found.directory, found.signatures, [last]
    counts = [charter.missing(domain, data, signatures) for charter in needed]
    if not any(counts):
        return "It has all the signatures that it needs."
    parts = [
        f"{count} of charter {charter.version}"
        for count, charter in zip(counts, needed, strict=True)
        if count
    ]
    return f"Still missing: signatures of {' and '.join(parts)}."


def _expires(now: datetime, days: int) -> int:
    return int((now + timedelta(days=days)).timestamp())


def _require_new(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"{path}: there is a file already; move it away or name another with --out.")


def _write(path: Path, message: CharterFile | SignedDirectory) -> None:
    write_atomically(path, wire.encode(message), PUBLIC)


def _valid(make: Callable[[], T]) -> T:
    """Return what `make` makes. Raises `ConfigError` where it can't be made."""
    try:
        return make()
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        raise ConfigError(f"{fault['msg'].removeprefix('Value error, ')}.") from None
