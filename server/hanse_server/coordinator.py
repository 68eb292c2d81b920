"""Rounds under secure aggregation, from the invitation to the sum. Read `run`, then `_set_up`, then `_round`.

    rounds = MaskedRounds(transport, signed_plan, plan, league_directory, store.next_attempt, setup_rounds=20)
    outcome = rounds.run(round_, model)

The coordinator knows neither Flower nor files: it speaks through `Transport` and returns what happened. Every reply
is untrusted. One that cannot be understood is dropped and noted against its sender, and the others go on, down to
what the plan and secure aggregation need.

A set-up serves some rounds in a row. It touches no photo and costs no privacy, so it is tried again, with fresh keys
under a later attempt, whenever somebody is lost before everyone holds everyone's shares. When one member says that
another's shares are bad, one of the two is lying and nobody can tell which: both are left out from then on, which
costs the honest no more members than the corrupt ones.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hanse_common import messages, wire
from hanse_common.directory import Directory, SignedDirectory
from hanse_common.errors import RoundFailed
from hanse_common.messages import DeclineCode, Invitation, Start
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_common.secagg.aggregator import Aggregator, MaskedSum
from hanse_common.secagg.faults import Misbehaviour, Refusal, SumLost
from hanse_common.secagg.messages import (
    MAX_SETUP_BYTES,
    Agreed,
    Joined,
    Ready,
    Shares,
    Unmasked,
    Upload,
    Work,
)
from hanse_common.secagg.suite import Setup
from hanse_server import plausibility
from hanse_server.roll import R, Roll, trip
from hanse_server.transport import Transport

SETUP_TRIES = 5
"""How often in a row a set-up is tried before its round counts as failed."""

UNMASK_THREADS = 4
"""Threads that take masks out of a large sum; a small one takes one."""


@dataclass(frozen=True)
class RoundOutcome:
    """What a round gave: the league's update (`Plan.decode`) and who took what part.

    `update` has shape (d,), float64, in the model's units. `dropped` are roster members whose update is not in it.
    `blamed` holds a reason for each merchant that broke the protocol. Names are the transport's. `norm` is that of
    the sum and `bound` what honest merchants' stays below, see `hanse_server.plausibility`; `failures` says why each
    attempt before this one came to nothing.
    """

    update: NDArray[np.float64]
    uploaded: tuple[str, ...]
    dropped: tuple[str, ...]
    declined: Mapping[str, DeclineCode]
    blamed: Mapping[str, str]
    norm: float = 0.0
    bound: float = math.inf
    failures: tuple[RoundFailed, ...] = ()


@dataclass(frozen=True)
class LeagueDirectory:
    """The league's directory as it is handed to merchants, and opened."""

    signed: SignedDirectory
    opened: Directory

    @cached_property
    def identities(self) -> dict[str, bytes]:
        """The identity of each name."""
        return self.opened.identities()

    @cached_property
    def names(self) -> dict[bytes, str]:
        """The name of each identity."""
        return {identity: name for name, identity in self.identities.items()}


class MaskedRounds:
    """Runs rounds one after the other; implements `hanse_server.league.Rounds`.

    `directory` returns the league's directory as of now, asked at each set-up. `next_attempt` returns a number that
    was never used for this plan, once it is recorded. A round is tried `attempts` times at most. `deadline` is asked as
    a trip begins, by its kind and the plan's deadline for it, and returns how long it waits, in seconds
    (`hanse_server.deadlines`). `clock` returns seconds since 1970. `watch`, for those who want to see what the server
    sees, hears each masked upload's name and residues, and each sum under the name "".
    """

    def __init__(
        self,
        transport: Transport,
        signed_plan: SignedPlan,
        plan: Plan,
        directory: Callable[[], LeagueDirectory],
        next_attempt: Callable[[], int],
        *,
        setup_rounds: int,
        attempts: int,
        deadline: Callable[[str, float], float] = lambda kind, planned: planned,
        clock: Callable[[], float] = time.time,
        watch: Callable[[str, NDArray[np.uint32]], None] | None = None,
    ) -> None:
        self._transport = transport
        self._signed_plan = signed_plan
        self._plan = plan
        self._directory = directory
        self._listed = directory()
        self._next_attempt = next_attempt
        self._setup_rounds = setup_rounds
        self._attempts = attempts
        self._deadline = deadline
        self._clock = clock
        self._watch = watch
        self._excluded: set[str] = set()
        self._aggregator: Aggregator | None = None

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        """Run the round `round_`, counted from 0, from `model`, shape (d,), and return its outcome.

        Raises `RoundFailed` when it fails in all its attempts; no sum of it is then applied.
        """
        failures: list[RoundFailed] = []
        for _ in range(self._attempts):
            roll = Roll()
            try:
                aggregator = self._aggregator
                if aggregator is None or round_ >= aggregator.setup.round + aggregator.setup.rounds:
                    aggregator = self._set_up_stubbornly(round_, roll)
                self._aggregator = aggregator
                outcome = self._round(aggregator, round_, model, roll)
                return replace(outcome, failures=tuple(failures))
            except RoundFailed as failure:
                self._aggregator = None
                failures.append(failure)
        tried = " ".join(f"Attempt {number}: {text}" for number, text in enumerate(failures, start=1))
        raise RoundFailed(
            f"Round {round_ + 1} of {self._plan.training.rounds} failed. {tried}", attempts=tuple(failures)
        )

    def forget(self) -> None:
        """Begin anew with the next round: those who were set up together are asked for something else now."""
        self._aggregator = None

    def _set_up_stubbornly(self, round_: int, roll: Roll) -> Aggregator:
        reason = ""
        lost: set[str] = set()
        for _ in range(SETUP_TRIES):
            try:
                return self._set_up(round_, roll, frozenset(lost))
            except _Again as again:
                reason = str(again)
                lost |= again.lost
        raise RoundFailed(
            f"{SETUP_TRIES} set-ups were tried; in the last, {reason}: {roll.describe()}.", "setup"
        )

    def _set_up(self, round_: int, roll: Roll, lost: frozenset[str]) -> Aggregator:
        """Bring merchants together: keys, then shares, then everyone's word that all shares are there.

        Those who were `lost` on the way in a try just before are not invited to this one.
        """
        cohort = self._plan.cohort
        invited = self._gather(lost)
        setup = Setup(
            plan_digest=self._plan.digest,
            round=round_,
            rounds=min(self._setup_rounds, self._plan.training.rounds - round_),
            attempt=self._next_attempt(),
            directory_digest=self._listed.opened.digest,
        )
        entities = self._listed.opened.entities(self._clock())
        aggregator = Aggregator(setup, cohort.parameters, entities)
        invitation = Invitation(
            **setup.work,
            rounds=setup.rounds,
            signed_plan=self._signed_plan,
            signed_directory=self._listed.signed,
        )
        for merchant, joined, _ in self._trip(Joined, dict.fromkeys(invited, invitation), roll):
            with _blaming(merchant, roll):
                aggregator.add_member(self._listed.identities[merchant], joined)
        try:
            roster = aggregator.roster()
        except Refusal as refusal:
            raise RoundFailed(
                f"{len(invited)} merchants were invited. {refusal}: {roll.describe()}.", "setup"
            ) from None
        there = [self._listed.names[member.identity] for member in roster.members]

        for merchant, shares, _ in self._trip(Shares, dict.fromkeys(there, roster), roll):
            with _blaming(merchant, roll):
                aggregator.add_shares(self._listed.identities[merchant], shares)
        self._settle_disputes(roll)
        missing = [self._listed.names[identity] for identity in aggregator.missing_shares()]
        if missing:
            self._excluded |= {name for name in missing if name in roll.blamed}
            raise _Again(f"no shares came from {', '.join(missing)}", missing)

        deliveries = {name: aggregator.delivery(self._listed.identities[name]) for name in there}
        ready = {name for name, _, _ in self._trip(Ready, deliveries, roll)}
        # Who names a culprit is there, and may come again once the dispute is settled.
        lost_now = set(there) - ready - {name for name, identity in roll.accused.items() if identity}
        self._settle_disputes(roll)
        if len(ready) < cohort.parameters.required(len(there)):
            raise _Again(f"{len(ready)} of {len(there)} merchants were ready", lost_now)
        return aggregator

    def _round(
        self, aggregator: Aggregator, round_: int, model: NDArray[np.float32], roll: Roll
    ) -> RoundOutcome:
        """Train and upload, agree on who survived, unmask the sum."""
        model_bytes = messages.model_to_bytes(model)
        sum_ = aggregator.open_round(round_, messages.model_digest(model_bytes), self._plan.dimension)
        roster = [self._listed.names[member.identity] for member in aggregator.members]
        uploads = self._uploads(Start(**sum_.work, model=model_bytes), roster, roll)
        del model_bytes  # each is a model's size
        self._add_up(sum_, uploads, roll)
        try:
            total = self._unmasked(sum_, roster, roll)
        except SumLost as lost:
            self._excluded |= {self._listed.names[identity] for identity in lost.culprits}
            raise RoundFailed(f"{lost}: {roll.describe()}.", "sum_lost") from None
        survivors = [roster[place] for place in sum_.places]
        if self._watch is not None:
            self._watch("", total)
        verdict = plausibility.judge(self._plan, round_, model, total, len(survivors))
        if not verdict.plausible:
            raise RoundFailed(verdict.refusal(self._plan, len(survivors)), "implausible")
        return RoundOutcome(
            update=self._plan.decode(total, len(survivors)),
            uploaded=tuple(sorted(survivors)),
            dropped=tuple(sorted(set(roster) - set(survivors))),
            declined=roll.declined,
            blamed=roll.blamed,
            norm=verdict.norm,
            bound=verdict.bound,
        )

    def _uploads(
        self, start: Start, roster: list[str], roll: Roll
    ) -> Iterator[tuple[str, Upload, memoryview]]:
        reachable = set(self._transport.merchants())
        asked = {name: start for name in roster if name in reachable}
        return self._trip(Upload, asked, roll, self._plan.cohort.upload_deadline)

    def _add_up(self, sum_: MaskedSum, uploads: Iterator[tuple[str, Upload, memoryview]], roll: Roll) -> None:
        for merchant, _, vector in uploads:
            with _blaming(merchant, roll):
                sum_.add_vector(self._listed.identities[merchant], vector)
                self._show(merchant, vector)
            del vector  # while the next is waited for

    def _unmasked(self, sum_: MaskedSum, roster: list[str], roll: Roll) -> NDArray[np.uint32]:
        """Return the sum of the uploads, once the survivors agreed on who they are and opened its masks."""
        survivors = sum_.survivors()
        there = [roster[place] for place in survivors.places]
        for merchant, agreed, _ in self._trip(Agreed, dict.fromkeys(there, survivors), roll):
            with _blaming(merchant, roll):
                sum_.add_agreed(self._listed.identities[merchant], agreed)
        agreement = sum_.agreement()
        for merchant, unmasked, _ in self._trip(Unmasked, dict.fromkeys(there, agreement), roll):
            with _blaming(merchant, roll):
                sum_.add_unmasked(self._listed.identities[merchant], unmasked)
        return sum_.total(UNMASK_THREADS)

    def _gather(self, lost: frozenset[str]) -> list[str]:
        """Return who is invited: members of the directory, as of now, that are there and not left out."""
        gathered = self._transport.gather()
        self._listed = self._directory()
        invited = [name for name in gathered if name in self._listed.identities]
        invited = [name for name in invited if name not in self._excluded | lost]
        return invited[: self._plan.cohort.max_merchants]

    def _settle_disputes(self, roll: Roll) -> None:
        """Leave out both sides where one says that the other's shares are bad."""
        for accuser, identity in roll.accused.items():
            accused = self._listed.names.get(identity)
            if accused is not None and accused != accuser and accused not in self._excluded:
                self._excluded |= {accuser, accused}
                roll.blamed[accused] = f"{accuser} says that its part in the set-up is bad"
        roll.accused.clear()

    def _trip(
        self, expected: type[R], payloads: Mapping[str, Work], roll: Roll, deadline: float | None = None
    ) -> Iterator[tuple[str, R, memoryview]]:
        max_bytes = MAX_SETUP_BYTES + wire.MAX_DOCUMENT_BYTES
        if expected is Upload:
            max_bytes = ring.WORD.itemsize * self._plan.dimension + wire.MAX_DOCUMENT_BYTES
        planned = self._plan.cohort.join_deadline if deadline is None else deadline
        seconds = self._deadline(expected.__name__.lower(), planned)
        return trip(self._transport, expected, payloads, seconds, max_bytes, roll)

    def _show(self, merchant: str, vector: memoryview) -> None:
        if self._watch is not None:
            self._watch(merchant, ring.from_bytes(vector, self._plan.dimension))


class _Again(Exception):
    """A set-up came to nothing; another may do better, without those who were lost in it."""

    def __init__(self, reason: str, lost: Iterable[str]) -> None:
        super().__init__(reason)
        self.lost = frozenset(lost)


@contextmanager
def _blaming(merchant: str, roll: Roll) -> Iterator[None]:
    """Note `Misbehaviour` inside against the merchant, and go on."""
    try:
        yield
    except Misbehaviour as misbehaviour:
        roll.blamed[merchant] = str(misbehaviour)
