"""A shop over real files, and a round that it takes part in, up to any of its trips.

shop = Shop(folder)
request = request_of("roster", shop)      # the invitation was answered; the roster comes next
reply = shop.ask(request)
"""

import itertools
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.participant import Participant, PinnedLeague
from hanse_client.policy import Policy
from hanse_common import messages, signing, wire
from hanse_common.messages import Declined, Invitation, Start
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_common.secagg.aggregator import Aggregator
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Agreed, Joined, Ready, Shares, Unmasked, Upload
from hanse_common.secagg.suite import Setup

from . import seeds

POLICY = Policy(league="test", epsilon=6.0, delta=2e-5)
OWN, *PEERS = seeds.MERCHANTS[:3]
TRIPS = ("invitation", "roster", "delivery", "start", "survivors", "agreement")
ANSWERS = {model.kind: model for model in (Joined, Shares, Ready, Upload, Agreed, Unmasked, Declined)}


def answer(reply: bytes) -> Any:
    """Return the message in a merchant's reply."""
    return wire.decode(ANSWERS[reply[2]], reply, messages.MAX_MESSAGE_BYTES)


class Recorder:
    """A trainer that notes how many charges the ledger held when it was asked for photos."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.charges_seen: list[int] = []

    def accepts(self, plan: Plan) -> bool:
        return True

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        self.charges_seen.append(self.ledger.counter)
        return np.zeros(plan.dimension, dtype=np.uint32)


class Shop:
    """A participant over a ledger and marks in `folder`; `told` is what its owner hears, `waits` its waits, in s."""

    def __init__(self, folder: Path, policy: Policy = POLICY, trainer: Any = None) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite", policy.budget)
        self.markers = Markers(folder / "markers.sqlite")
        self.trainer = trainer or Recorder(self.ledger)
        self.told: list[str] = []
        self.waits: list[float] = []
        self.attempts = itertools.count()
        self.participant = Participant(
            PinnedLeague(signing.public_bytes(seeds.OPERATOR), seeds.PINNED, seeds.TAXONOMY),
            policy,
            OWN,
            self.ledger,
            self.markers,
            self.trainer,
            self.told.append,
            clock=lambda: seeds.NOW,
            wait=self.waits.append,
        )

    def ask(self, request: Any) -> Any:
        """Return the answer to a message, or to bytes."""
        data = request if isinstance(request, bytes) else wire.encode(request)
        return answer(self.participant.handle(data))

    def untouched(self) -> bool:
        """Return whether nothing was charged and no photo read."""
        return self.ledger.counter == 0 and not self.trainer.charges_seen


def invite(plan: Plan, attempt: int = 0, rounds: int = 1, **changes: Any) -> Invitation:
    """Return an invitation that is all right, changed by keyword."""
    fields: dict[str, Any] = {
        "plan_digest": plan.digest,
        "round": 0,
        "attempt": attempt,
        "rounds": rounds,
        "signed_plan": SignedPlan.sign(plan, seeds.OPERATOR),
        "signed_directory": seeds.signed_directory(),
    }
    return Invitation(**(fields | changes))


class Round:
    """A shop, two other merchants and an honest aggregator; each method returns the shop's answer to its trip."""

    def __init__(self, shop: Shop, plan: Plan, rounds: int = 1) -> None:
        self.shop, self.plan = shop, plan
        self.invitation = invite(plan, next(shop.attempts), rounds)
        listed = seeds.directory()
        setup = Setup(**self.invitation.work, rounds=rounds, directory_digest=listed.digest)
        entities, parameters = listed.entities(seeds.NOW), plan.cohort.parameters
        self.aggregator = Aggregator(setup, parameters, entities)
        self.peers = {signing.public_bytes(key): Merchant(setup, parameters, key, entities) for key in PEERS}
        self.own = signing.public_bytes(OWN)
        self.start = Start(**setup.work, model=bytes(4 * plan.dimension))

    def requests(self) -> Generator[tuple[str, Any], Any, None]:
        """Yield each trip and its request, and go on with the shop's answer, which is to be sent back."""
        plan, own, aggregator = self.plan, self.own, self.aggregator
        aggregator.add_member(own, (yield "invitation", self.invitation))
        for identity, peer in self.peers.items():
            aggregator.add_member(identity, peer.join())
        roster = aggregator.roster()
        aggregator.add_shares(own, (yield "roster", roster))
        for identity, peer in self.peers.items():
            aggregator.add_shares(identity, peer.share(roster, 0, {}))
        yield "delivery", aggregator.delivery(own)
        for identity, peer in self.peers.items():
            peer.receive(aggregator.delivery(identity))
        digest = messages.model_digest(self.start.model)
        total = aggregator.open_round(self.start.round, digest, plan.dimension)
        total.add_upload(own, (yield "start", self.start))
        for identity, peer in self.peers.items():
            peer.open_round(self.start.round, digest)
            zeros = np.zeros(plan.dimension, dtype=np.uint32)
            peer.mask(zeros)
            total.add_upload(identity, Upload(**total.work, vector=ring.to_bytes(zeros)))
        survivors = total.survivors()
        total.add_agreed(own, (yield "survivors", survivors))
        for identity, peer in self.peers.items():
            total.add_agreed(identity, peer.agree(survivors))
        agreement = total.agreement()
        total.add_unmasked(own, (yield "agreement", agreement))

    def until(self, trip: str) -> bytes:
        """Run the round until the question of `trip`, and return that, encoded and not asked."""
        asked = self.requests()
        found, request = next(asked)
        while found != trip:
            found, request = asked.send(self.shop.ask(request))
        return wire.encode(request)


def request_of(trip: str, shop: Shop) -> bytes:
    """Return the request of `trip` to `shop`, after it answered all before."""
    return Round(shop, seeds.plans()[0], rounds=2).until(trip)
