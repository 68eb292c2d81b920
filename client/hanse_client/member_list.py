"""The list of members that the holder of the league's key signs, as a YAML file.

directory = load(MemberList, Path("members.yaml")).directory(datetime.now(UTC))
"""

from datetime import datetime, timedelta
from typing import Annotated

from pydantic import Field, ValidationError

from hanse_common.config import Section
from hanse_common.directory import MAX_MEMBERS, Directory, Entry
from hanse_common.errors import ConfigError
from hanse_common.wire import Name


class ListedMember(Section):
    """One member: the entity behind it, and its public identity, 64 hexadecimal digits."""

    entity: Annotated[str, Field(min_length=1, max_length=128)]
    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class MemberList(Section):
    """The whole file. `days` is how long the directory and its entries hold."""

    league: Name
    version: Annotated[int, Field(ge=1, lt=1 << 31)]
    days: Annotated[int, Field(ge=1, le=3660)] = 365
    members: Annotated[dict[Name, ListedMember], Field(min_length=3, max_length=MAX_MEMBERS)]

    def directory(self, now: datetime) -> Directory:
        """Return the directory as of `now`. Raises `ConfigError` for an entity or identity that is there twice."""
        expires = int((now + timedelta(days=self.days)).timestamp())
        entries = tuple(
            Entry(name=name, entity=member.entity, identity=bytes.fromhex(member.identity), expires=expires)
            for name, member in sorted(self.members.items())
        )
        try:
            return Directory(league=self.league, version=self.version, expires=expires, entries=entries)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False)[0]
            raise ConfigError(f"members: {fault['msg']}.") from None
