"""Who is a member now: the directory's file, read again when it has changed.

    members = Members(service, league)
    members.refresh()                    # before each block
    members.current, members.names, members.nodes, members.identities

A file that can't be used changes nothing: the members stay those of the directory before, and the operator hears why.
"""

import time
from collections.abc import Callable

from hanse_common import wire
from hanse_common.credentials import node_public_from_point, node_public_pem
from hanse_common.directory import MAX_DIRECTORY_BYTES, SignedDirectory
from hanse_common.errors import ConfigError, DirectoryRefused, HanseError, SignatureInvalid, WireError
from hanse_common.files import read_bounded
from hanse_server.config import Service
from hanse_server.coordinator import LeagueDirectory


class Members:
    """The members of `league`, by the directory that `service` names.

    Raises `ConfigError`, `SignatureInvalid`, `WireError` or `DirectoryRefused` when there is none to begin with.
    """

    def __init__(self, service: Service, league: str, clock: Callable[[], float] = time.time) -> None:
        self._path = service.directory
        self._pinned = bytes.fromhex(service.charter)
        self._league = league
        self._clock = clock
        self._told = ""
        self._take(self._read())

    def refresh(self, tell: Callable[[str], None]) -> None:
        """Read the file again; `tell` hears of another version, and once of each reason not to take it."""
        try:
            found = self._read()
            before, after = self.current.opened, found.opened
            if after == before:
                self._told = ""
                return
            if after.version <= before.version:
                raise DirectoryRefused(
                    f"found version {after.version}, version {before.version} was there before; merchants refuse it."
                )
            self._take(found)
            tell(f"The league's directory is now version {after.version}, with {len(after.entries)} members.")
        except HanseError as error:
            if str(error) != self._told:
                self._told = str(error)
                tell(f"The directory cannot be used, the one before stays: {error}")

    def _read(self) -> LeagueDirectory:
        path = self._path
        data = read_bounded(path, 2 * MAX_DIRECTORY_BYTES, "the league's signed directory", ConfigError)
        try:
            signed = wire.decode(SignedDirectory, data)
            opened = signed.open(self._pinned, self._clock())
        except WireError as error:
            raise WireError(f"{path}: not a directory. {error}") from None
        except SignatureInvalid as error:
            raise SignatureInvalid(f"{path}: {error} Ask those who hold the league's key.") from None
        except DirectoryRefused as error:
            raise DirectoryRefused(f"{path}: {error}") from None
        if opened.league != self._league:
            raise ConfigError(
                f"{path}: found the directory of {opened.league}, the plan is {self._league}'s."
            )
        return LeagueDirectory(signed, opened)

    def _take(self, found: LeagueDirectory) -> None:
        entries = found.opened.entries
        nodes = {
            node_public_pem(node_public_from_point(entry.node_key)): entry.name
            for entry in entries
            if entry.node_key
        }
        self.current = found
        self.names = frozenset(nodes.values())
        self.nodes = nodes
        self.identities = {entry.identity: entry.name for entry in entries}
