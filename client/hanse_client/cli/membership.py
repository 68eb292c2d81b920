"""Keys and the list of members: `keygen`, `sign-directory`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say
from hanse_client.config import ClientConfig
from hanse_client.member_list import MemberList
from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.credentials import create_node_key
from hanse_common.directory import SignedDirectory
from hanse_common.errors import ConfigError
from hanse_common.files import PUBLIC, write_atomically
from hanse_common.vision.photo import shown


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
    say(f"Wrote {shown(settings.identity_path)} and {shown(settings.node_key_path)}: secret, back them up.")
    say("\nFor the league's directory, give these lines to whoever holds the league's key:")
    say(f"  {name}:\n    entity: Your Shop Ltd\n    identity: {signing.public_bytes(identity).hex()}")
    say(f"\nGive the operator the file {shown(public)} and these lines:")
    say(f"  {name}:\n    node_key: {public.name}")


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
    say(
        f"Wrote {shown(directory_file)}: version {directory.version}, {len(directory.entries)} members, good until "
        f"{expires:%d %B %Y}. The operator needs this file."
    )
    say(f"Everyone pins this key as league_key: {signing.public_bytes(secret).hex()}")
