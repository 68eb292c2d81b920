"""The recognizer that the league releases: `update`."""

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say
from hanse_client.config import ClientConfig
from hanse_client.releases import Releases
from hanse_common import commands
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError, ReleaseRefused
from hanse_common.files import read_bounded

MAX_PEM_BYTES = 1 << 20


def update(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Take the recognizer that the league released last, if it is not in use yet. Your daemon does it by itself.

    It is fetched from the league's server, and used only if the operator signed it, it is later than any you have seen,
    and every file of it is what was signed.

    Exit codes: 0 it is in use, or there is none later, 27 it was not taken or could not be fetched.
    """
    from hanse_client.keys import load_identity
    from hanse_client.stream import Lost, Refused
    from hanse_client.traffic import Traffic
    from hanse_client.updates import Updates, one_line

    settings = load(ClientConfig, config)
    if settings.connection is None:
        raise ConfigError(f"{config}: connection: missing; expected a section with the league's server.")
    authority = read_bounded(
        settings.connection.authority, MAX_PEM_BYTES, "the league's certificate authority", ConfigError
    )
    traffic = Traffic(settings.state / "traffic.json", settings.network)
    updates = Updates(settings, load_identity(settings), authority, traffic)
    with commands.until_stopped() as stop, out.status("looking for a recognizer"):
        try:
            found = updates.look(stop.is_set, take=True)
        except (Lost, Refused) as error:
            raise ReleaseRefused(
                f"The server could not be asked: {one_line(str(error))}. Is it up? Try again later."
            ) from None
    if found is not None:
        say(found.told())
        return
    used = Releases.of(settings).in_use()
    say(
        "The league has released none yet."
        if used is None
        else f"Version {used.version} is the newest, and in use."
    )
