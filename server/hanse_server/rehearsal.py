"""What a plan's rounds will cost, found out before it is signed: a few of them, with everything but photos and network.

    found = rehearse(plan, merchants=10, setup_rounds=20)
    found.setup.up, found.round.up                 # bytes of one merchant
    found.round.server_seconds, found.round.merchant_seconds

The server's own coordinator runs one set-up and up to two rounds with merchants of secure aggregation's own code. What
they say to each other is encoded, counted and decoded as on the streams; what they upload is zeros under real masks,
which cost the same as anything else. Bytes are exact but for the directory, which is one of so many members without
vouchers, and without what TLS, HTTP/2 and Flower put around them.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from itertools import count

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import signing, wire
from hanse_common.charter import founded
from hanse_common.credentials import node_point
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.membership import Request, SignedRequest
from hanse_common.messages import MAX_MESSAGE_BYTES, Invitation, Start, model_digest
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Agreement, Delivery, Roster, Survivors, Upload, Work
from hanse_common.secagg.parameters import Parameters
from hanse_common.secagg.suite import Setup
from hanse_common.session import FRAME_BYTES, Answer, Ask
from hanse_server.coordinator import LeagueDirectory, MaskedRounds

ROUNDS = 2
"""How many rounds are rehearsed."""

TRIP = 1 << 10
"""The number of a trip in the middle of a training, for its size."""

NEVER = (1 << 40) - 1

_QUESTIONS: tuple[type[Work], ...] = (Invitation, Roster, Delivery, Start, Survivors, Agreement)
_SETUP_ANSWERS = ("joined", "shares", "ready")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Cost:
    """What one set-up, or one round, or many, cost: bytes, and seconds on this machine.

    `up` is what the merchant that sends most sends, `down` what the one that hears most hears; `received` and `sent`
    are the server's, of all merchants together. `merchant_seconds` is one merchant's time for masks and messages.
    """

    up: float = 0
    down: float = 0
    received: float = 0
    sent: float = 0
    merchant_seconds: float = 0
    server_seconds: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Return both together."""
        return Cost(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> "Cost":
        """Return so many of it."""
        return Cost(*(factor * value for value in astuple(self)))


@dataclass(frozen=True)
class Rehearsed:
    """What a set-up for `setup_rounds` rounds and a round of `plan` cost, with so many `merchants`."""

    plan: Plan
    merchants: int
    setup_rounds: int
    setup: Cost
    round: Cost

    def total(self, rounds: int, every: int = 0) -> Cost:
        """Return the cost of `rounds` rounds. With `every`, a set-up ends after so many rounds: others then begin."""
        return self.setup.times(self.setups(rounds, every)) + self.round.times(rounds)

    def setups(self, rounds: int, every: int = 0) -> int:
        """Return how many set-ups `rounds` rounds take, if nobody is lost on the way."""
        if not 0 < every < rounds:
            return math.ceil(rounds / self.setup_rounds)
        parts = [every] * (rounds // every) + [rounds % every]
        return sum(math.ceil(part / self.setup_rounds) for part in parts)


def rehearse(plan: Plan, merchants: int, setup_rounds: int, tell: Tell = lambda text: None) -> Rehearsed:
    """Run one set-up for `setup_rounds` rounds of `plan`, and up to two of them, with so many `merchants`.

    `tell` hears what is being done. Raises `RoundFailed` when so few merchants are too few for the plan.
    """
    key = Ed25519PrivateKey.generate()
    signed = SignedPlan.sign(plan, key)
    identities = {f"merchant-{number:03}": Ed25519PrivateKey.generate() for number in range(merchants)}
    directory = _directory(plan.league, identities)
    setup_rounds = min(setup_rounds, plan.training.rounds)
    league = _League(plan.cohort.parameters, plan.dimension, identities, directory.opened, tell)
    attempts = count(1)
    rounds = MaskedRounds(
        league, signed, plan, lambda: directory, lambda: next(attempts), setup_rounds=setup_rounds, attempts=1
    )
    model = np.zeros(plan.model_dimension, dtype=np.float32)
    rehearsed = min(ROUNDS, setup_rounds)
    for round_ in range(rehearsed):
        league.begin()
        rounds.run(round_, model)
        league.end()
    return Rehearsed(plan, merchants, setup_rounds, league.setup, league.round.times(1 / rehearsed))


def streamed(kind: type[Ask] | type[Answer], payload: int) -> int:
    """Return how many bytes a payload of so many takes on a stream, in its record and frames."""
    record = len(wire.head(kind(trip=TRIP, payload=b""), payload)) + payload
    return record + math.ceil(record / (FRAME_BYTES - 1))


@dataclass
class _League:
    """A `hanse_server.transport.Transport` to merchants in this process, with a meter on it."""

    parameters: Parameters
    dimension: int
    identities: Mapping[str, Ed25519PrivateKey]
    directory: Directory
    tell: Tell
    setup: Cost = field(default_factory=Cost)
    round: Cost = field(default_factory=Cost)
    _merchants: dict[str, Merchant] = field(default_factory=dict)
    _began: float = 0.0

    def gather(self) -> tuple[str, ...]:
        return tuple(self.identities)

    def merchants(self) -> tuple[str, ...]:
        return tuple(self.identities)

    def begin(self) -> None:
        """From here on the server's time runs."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """Put the server's time since `begin`, or since the set-up, to the round's account."""
        self.round += Cost(server_seconds=time.perf_counter() - self._began)

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        """Yield the merchants' answers, each computed when it is asked for; their time is not the server's."""
        if kind == "upload" and self.setup.server_seconds == 0:
            now = time.perf_counter()
            self.setup, self._began = self.setup + Cost(server_seconds=now - self._began), now
        up = down = received = sent = 0
        seconds = 0.0
        for number, (name, question) in enumerate(payloads.items(), start=1):
            self.tell(f"{kind}, {number} of {len(payloads)} merchants")
            started = time.perf_counter()
            answer = self._answer(name, question)
            asked, answered = streamed(Ask, len(question)), streamed(Answer, len(answer))
            taken = time.perf_counter() - started
            self._began += taken
            up, down, seconds = max(up, answered), max(down, asked), seconds + taken
            received, sent = received + answered, sent + asked
            yield name, answer
        cost = Cost(up, down, received, sent, seconds / max(len(payloads), 1))
        if kind in _SETUP_ANSWERS:
            self.setup += cost
        else:
            self.round += cost

    def _answer(self, name: str, data: bytes) -> bytes:
        """Do a merchant's part: what `hanse_client.participant` does, but for photos, ledger and policy."""
        question = wire.decode_any(_QUESTIONS, data, MAX_MESSAGE_BYTES)
        merchant = self._merchants.get(name)
        if isinstance(question, Invitation):
            setup = Setup(
                plan_digest=question.plan_digest,
                round=question.round,
                rounds=question.rounds,
                attempt=question.attempt,
                directory_digest=self.directory.digest,
            )
            entities = self.directory.entities(0)
            merchant = Merchant(setup, self.parameters, self.identities[name], entities)
            self._merchants[name] = merchant
            return wire.encode(merchant.join())
        if merchant is None:
            raise ValueError(f"{name}: asked for more before it was invited")
        return wire.encode(_said(merchant, question, self.dimension))


def _said(merchant: Merchant, question: Work, dimension: int) -> Work:
    match question:
        case Roster():
            return merchant.share(question, 0, {})
        case Delivery():
            return merchant.receive(question)[1]
        case Start():
            merchant.open_round(question.round, model_digest(question.model))
            residues = np.zeros(dimension, dtype=np.uint32)
            merchant.mask(residues)
            return Upload(**question.work, vector=residues.tobytes())
        case Survivors():
            return merchant.agree(question)
        case Agreement():
            return merchant.unmask(question)
    raise ValueError(f"Found {type(question).__name__}, which no merchant is asked.")


def _directory(league: str, identities: Mapping[str, Ed25519PrivateKey]) -> LeagueDirectory:
    """Return a directory of these merchants, each of which asked for its entry, as real ones do."""
    key = Ed25519PrivateKey.generate()
    charter = founded(league, key)
    digest = charter.read().digest
    entries = []
    for name, identity in sorted(identities.items()):
        node_key = node_point(ec.generate_private_key(ec.SECP384R1()).public_key())
        request = Request(
            charter=digest,
            name=name,
            entity=f"{name} Ltd",
            identity=signing.public_bytes(identity),
            node_key=node_key,
        )
        entries.append(Entry.of(SignedRequest.make(request, identity), NEVER))
    directory = Directory(league=league, charter=digest, version=1, expires=NEVER, entries=tuple(entries))
    return LeagueDirectory(SignedDirectory.of(directory, (charter,)).signed_by(key), directory)
