"""The league's card: one small YAML file with all that a merchant must know of a league before it asks to join.

    card = load(LeagueCard, Path("league.yaml"))
    print(card.words())

The operator hands it out, and nothing in it is secret. Who believes it without comparing its words with a member may
be in a league of the operator's own making.
"""

import hashlib
from typing import Annotated, Literal

import yaml
from pydantic import Field

from hanse_common.config import Section
from hanse_common.fingerprint import words
from hanse_common.session import Address
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Name

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LeagueCard(Section):
    """The whole file.

    Attributes:
        league: the league's name.
        charter: the digest of its founding charter.
        operator_key: the public key by which plans are signed.
        server: where merchants' nodes connect, host:port.
        authority: PEM of the authority that the server's certificate comes from.
        taxonomy: what the league tells apart.
    """

    league: Name
    charter: Key
    operator_key: Key
    server: Address
    authority: Annotated[str, Field(min_length=1, max_length=65_536)]
    taxonomy: Taxonomy

    def words(self, language: Literal["en", "zh"] = "en") -> str:
        """Return the twelve words that stand for the charter, the operator's key and the authority together."""
        parts = [self.league, self.charter, self.operator_key, self.authority.strip()]
        return words(hashlib.sha256("\n".join(["hanse league card", *parts]).encode()).digest(), language)

    def to_yaml(self) -> str:
        """Return the file's text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=10_000)
