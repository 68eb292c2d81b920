"""Merchants and a server that all keep to the protocol, run trip by trip; dropouts are those a trip does not name.

league = League.of(5, n_min=4).start()
round_ = league.open(0, dimension=3)
round_.upload({place: update, …}), round_.agree(places), round_.unmask(places)
total = round_.total()
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from hanse_common import signing, wire
from hanse_common.directory import Directory, Entry
from hanse_common.secagg import ring
from hanse_common.secagg.aggregator import Aggregator, MaskedSum
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Roster, Shares, Upload
from hanse_common.secagg.parameters import Parameters
from hanse_common.secagg.suite import Setup
from hanse_common.secagg.witness import Witness

M = TypeVar("M", bound=wire.Message)


def said(message: M) -> M:
    """Return `message` as it comes out of the wire."""
    return wire.decode(type(message), wire.encode(message), 1 << 24)


@dataclass
class League:
    """One set-up. Merchants are named by their places in the roster, and have the same identities in every set-up."""

    setup: Setup
    parameters: Parameters
    identities: list[Ed25519PrivateKey]
    entities: dict[bytes, str]
    merchants: list[Merchant] = field(init=False)
    aggregator: Aggregator = field(init=False)

    def __post_init__(self) -> None:
        self.merchants = [
            Merchant(self.setup, self.parameters, identity, self.entities) for identity in self.identities
        ]
        self.aggregator = Aggregator(self.setup, self.parameters, self.entities)

    @classmethod
    def of(cls, n: int, n_min: int = 3, c: int = 1, **changes: Any) -> Self:
        """Return `n` merchants that are alone in their directory, before the first trip."""
        keys = [Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"%d" % k).digest()) for k in range(n)]
        keys.sort(key=signing.public_bytes)
        directory = Directory(
            league="test",
            charter=bytes(32),
            version=1,
            expires=2,
            entries=tuple(
                Entry(name=f"m{k:03}", entity=f"Entity {k}", identity=signing.public_bytes(key), expires=2)
                for k, key in enumerate(keys)
            ),
        )
        fields = {
            "plan_digest": bytes(range(32)),
            "round": 0,
            "rounds": 1,
            "attempt": 0,
            "directory_digest": directory.digest,
        }
        return cls(Setup(**(fields | changes)), Parameters(n_min, c), keys, directory.entities(now=1))

    def identity(self, place: int) -> bytes:
        """Return the public identity of the merchant at `place`."""
        return signing.public_bytes(self.identities[place])

    def join(self) -> Roster:
        """Have everybody join."""
        for place, merchant in enumerate(self.merchants):
            self.aggregator.add_member(self.identity(place), said(merchant.join()))
        return said(self.aggregator.roster())

    def share(
        self,
        roster: Roster,
        counters: Mapping[int, int] | None = None,
        witnesses: Mapping[int, Mapping[bytes, Witness]] | None = None,
    ) -> list[Shares]:
        """Have everybody share, with ledgers at `counters` and what each remembers of others; return the shares."""
        found = []
        for place, merchant in enumerate(self.merchants):
            seen = (witnesses or {}).get(place, {})
            found.append(said(merchant.share(roster, (counters or {}).get(place, 0), seen)))
            self.aggregator.add_shares(self.identity(place), found[-1])
        return found

    def receive(self) -> list[dict[bytes, Witness]]:
        """Have everybody take the others' shares; return the counters that each then knows."""
        return [
            merchant.receive(said(self.aggregator.delivery(self.identity(place))))[0]
            for place, merchant in enumerate(self.merchants)
        ]

    def start(self) -> Self:
        """Run the three trips of the set-up."""
        self.share(self.join())
        self.receive()
        return self

    def open(self, round_: int, dimension: int, among: Iterable[int] | None = None) -> "Round":
        """Open a round at the server, and at the merchants `among`, by default all."""
        model = hashlib.sha256(b"model %d" % round_).digest()
        for place in range(len(self.merchants)) if among is None else among:
            self.merchants[place].open_round(round_, model)
        return Round(self, self.aggregator.open_round(round_, model, dimension))


@dataclass
class Round:
    """One round: each trip names those whose answer arrives."""

    league: League
    sum: MaskedSum

    def upload(self, updates: Mapping[int, NDArray[np.uint32]]) -> list[NDArray[np.uint32]]:
        """Have these merchants upload these updates; return the masked ones."""
        masked = []
        for place, update in updates.items():
            masked.append(update.copy())
            self.league.merchants[place].mask(masked[-1])
            upload = Upload(**self.sum.work, vector=ring.to_bytes(masked[-1]))
            self.sum.add_upload(self.league.identity(place), said(upload))
        return masked

    def agree(self, places: Iterable[int]) -> None:
        """Name the survivors to these merchants, who sign them."""
        survivors = said(self.sum.survivors())
        for place in places:
            agreed = self.league.merchants[place].agree(survivors)
            self.sum.add_agreed(self.league.identity(place), said(agreed))

    def unmask(self, places: Iterable[int]) -> None:
        """Show the signatures to these merchants, who help."""
        agreement = said(self.sum.agreement())
        for place in places:
            unmasked = self.league.merchants[place].unmask(agreement)
            self.sum.add_unmasked(self.league.identity(place), said(unmasked))

    def total(self, threads: int = 1) -> NDArray[np.uint32]:
        """Return the sum."""
        return self.sum.total(threads)


@pytest.fixture(scope="session")
def league() -> type[League]:
    """`League`: a fixture, since test files cannot import each other."""
    return League
