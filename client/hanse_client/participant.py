"""A merchant's side of a round: bytes in, bytes out. Read `handle`, then the methods below it, in the trips' order.

    participant = Participant(league, policy, identity, ledger, markers, trainer)
    reply = participant.handle(request)

The participant knows neither Flower nor the network. Whatever arrives is untrusted; whatever it answers is a
typed message without text. Refusals are decided before any photo is read, and their codes depend on the plan,
the policy and the ledger, never on a photo. The order of an upload is: get the masks ready, charge the ledger and
sync it, then touch the photos. When secure aggregation refuses, the set-up is over for this merchant; what nobody
signed changes nothing.
"""

import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.charges import Charge, Spent
from hanse_client.ledger import Ledger, Repeated
from hanse_client.markers import Begun, Markers
from hanse_client.policy import Policy
from hanse_common import messages, signing, wire
from hanse_common.directory import Directory
from hanse_common.errors import (
    BudgetExceeded,
    DirectoryRefused,
    LedgerError,
    PlanRefused,
    SignatureInvalid,
    WireError,
)
from hanse_common.messages import DeclineCode, Declined, Invitation, Start
from hanse_common.modes import TrendsTraining
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_common.secagg.faults import Fault, Refusal
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import (
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Ready,
    Roster,
    Shares,
    Survivors,
    Upload,
    Work,
)
from hanse_common.secagg.suite import Setup
from hanse_common.vision.taxonomy import Taxonomy

if TYPE_CHECKING:  # it brings torch, which the protocol does without
    from hanse_client.training import Trainer

log = logging.getLogger(__name__)

_REQUESTS = (Invitation, Roster, Delivery, Start, Survivors, Agreement)

MAX_REASON = 4000
"""Bound of the reason that the owner is told, in characters."""

MASK_THREADS = 4
"""Threads that mask a large update; a small one takes one."""


class _Declines(Exception):
    """The merchant does not go on; `code` is what the server hears."""

    def __init__(self, code: DeclineCode, reason: str, culprit: bytes = b"") -> None:
        super().__init__(reason)
        self.code = code
        self.culprit = culprit


@dataclass(frozen=True)
class PinnedLeague:
    """What a merchant pins: who signs plans, the digest of the league's charter (32 bytes each), and the classes."""

    operator_key: bytes
    charter: bytes
    taxonomy: Taxonomy


@dataclass
class _Session:
    """The set-up that this merchant is in, when its directory or a member expires, and the roster's identities."""

    setup: Setup
    plan: Plan
    merchant: Merchant
    expires: int
    roster: tuple[bytes, ...] = ()


class Participant:
    """One merchant in one league.

    `tell` brings the owner what the server never hears, `on_upload` each upload's plan and round (from 0). `clock`
    returns seconds since 1970; `wait` waits some seconds, until the upload's slot.
    """

    def __init__(
        self,
        league: PinnedLeague,
        policy: Policy,
        identity: Ed25519PrivateKey,
        ledger: Ledger,
        markers: Markers,
        trainer: "Trainer",
        tell: Callable[[str], None] = log.warning,
        on_upload: Callable[[Plan, int], None] = lambda plan, round_: None,
        clock: Callable[[], float] = time.time,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._league = league
        self._policy = policy
        self._identity = identity
        self._ledger = ledger
        self._markers = markers
        self._trainer = trainer
        self._tell = tell
        self._on_upload = on_upload
        self._clock = clock
        self._wait = wait
        self._monotonic = time.monotonic
        self._session: _Session | None = None
        self.owes = False
        """Whether a round was paid for and its sum has not been opened yet."""

    def handle(self, request: bytes) -> bytes:
        """Return the reply to `request`, untrusted bytes. Never raises for what the server may send."""
        work = Work(plan_digest=bytes(32), round=0, attempt=0)
        try:
            message: Work = wire.decode_any(_REQUESTS, request, messages.MAX_MESSAGE_BYTES)
            work = message
            return wire.encode(self._answer(message))
        except WireError as error:
            refused = _Declines(DeclineCode.MALFORMED, str(error))
        except _Declines as declines:
            refused = declines
        except Refusal as refusal:
            refused = self._in_terms_of_the_league(refusal)
            self._session = None
        except LedgerError as error:
            refused = _Declines(DeclineCode.UNAVAILABLE, str(error))
        self._tell(f"Declined round {work.round + 1} ({refused.code}): {printable(str(refused))}")
        return wire.encode(Declined(**work.work, code=refused.code, culprit=refused.culprit))

    def _answer(self, message: Work) -> Work:
        match message:
            case Invitation():
                return self._join(message)
            case Roster():
                return self._share(message)
            case Delivery():
                return self._receive(message)
            case Start():
                return self._upload(message)
            case Survivors():
                return self._agree(message)
            case Agreement():
                unmasked = self._joined(message).merchant.unmask(message)
                self.owes = False
                return unmasked
            case _:
                raise WireError("a message of a kind that no merchant is asked.")

    def _join(self, invitation: Invitation) -> Joined:
        """Judge the plan, the directory and the budget, and make fresh keys for the set-up."""
        plan = self._accepted_plan(invitation)
        self._session, self.owes = None, False
        if invitation.round + invitation.rounds > plan.training.rounds:
            raise _Declines(
                DeclineCode.UNEXPECTED,
                f"the plan has {plan.training.rounds} rounds, and this would be round "
                f"{invitation.round + invitation.rounds}.",
            )
        directory = self._believed_directory(invitation, plan)
        self._ledger_says(self._ledger.check, plan, invitation)
        try:
            self._markers.begin(plan.digest, invitation.attempt)
        except Begun as error:
            raise _Declines(DeclineCode.REPEATED, str(error)) from None
        setup = Setup(**invitation.work, rounds=invitation.rounds, directory_digest=directory.digest)
        merchant = Merchant(setup, plan.cohort.parameters, self._identity, directory.entities(self._clock()))
        now = self._clock()
        expires = min([directory.expires, *(one.expires for one in directory.entries if one.expires > now)])
        self._session = _Session(setup, plan, merchant, expires)
        return merchant.join()

    def _share(self, roster: Roster) -> Shares:
        """Check who takes part, and deal them the shares of this set-up's secrets."""
        session = self._joined(roster)
        session.roster = tuple(member.identity for member in roster.members)
        self._require_verified(session.roster, DeclineCode.ROSTER)
        return session.merchant.share(roster, self._ledger.counter, self._markers.witnesses())

    def _receive(self, delivery: Delivery) -> Ready:
        """Take everyone's shares, and remember their ledgers before saying so."""
        session = self._joined(delivery)
        counters, ready = session.merchant.receive(delivery)
        self._session = None  # over, should the marks not be written
        self._markers.remember(counters)
        self._session = session
        return ready

    def _upload(self, start: Start) -> Upload:
        """Charge, train, mask, once for each round."""
        session = self._joined(start)
        plan = session.plan
        if session.expires <= self._clock():
            raise _Declines(DeclineCode.DIRECTORY, "the league's directory has expired since this set-up.")
        try:
            model = messages.model_from_bytes(start.model, plan.model_dimension)
        except WireError as error:
            raise _Declines(DeclineCode.MODEL, str(error)) from None
        session.merchant.open_round(start.round, messages.model_digest(start.model))
        self._ledger_says(self._ledger.charge, plan, start)
        self.owes = True
        # From here on photos are read. Nothing that happens may show outside: an upload leaves at the plan's slot.
        began = self._monotonic()
        residues = self._trainer.contribution(plan, start.round, model)
        session.merchant.mask(residues, MASK_THREADS)
        self._on_upload(plan, start.round)
        self._wait(_until_slot(self._monotonic() - began, plan.cohort.upload_slot))
        return Upload(**start.work, vector=ring.to_bytes(residues))

    def _agree(self, survivors: Survivors) -> Agreed:
        """Say who survived, once enough of them are merchants that the owner knows."""
        session = self._joined(survivors)
        roster = session.roster
        known = [roster[place] for place in survivors.places if place < len(roster)]
        self._require_verified(known, DeclineCode.SURVIVORS)
        return session.merchant.agree(survivors)

    def _require_verified(self, identities: Collection[bytes], code: DeclineCode) -> None:
        """Decline unless as many of `identities` as the policy asks for are of members that the owner verified."""
        found = len(self._policy.trusted & set(identities))
        if found < self._policy.minimum_verified:
            raise _Declines(
                code,
                f"{found} of the merchants in this sum are ones that you verified; your policy needs "
                f"{self._policy.minimum_verified} (minimum_verified).",
            )

    def _joined(self, message: Work) -> _Session:
        """Return the set-up that the message is of."""
        session = self._session
        if session is None or (message.plan_digest, message.attempt) != (
            session.setup.plan_digest,
            session.setup.attempt,
        ):
            raise _Declines(DeclineCode.UNEXPECTED, "the server asked about a set-up that was not joined.")
        return session

    def _accepted_plan(self, invitation: Invitation) -> Plan:
        """Return the plan, once the operator signed it, the policy allows it and the trainer knows it."""
        try:
            plan = accepted_plan(
                invitation.signed_plan, self._league.operator_key, self._policy, self._league.taxonomy
            )
        except SignatureInvalid as error:
            raise _Declines(DeclineCode.SIGNATURE, str(error)) from None
        except PlanRefused as error:
            raise _Declines(DeclineCode.POLICY, str(error)) from None
        if plan.digest != invitation.plan_digest:
            raise _Declines(DeclineCode.MALFORMED, "the invitation names another plan than it carries.")
        if not self._trainer.accepts(plan):
            reason = "the photos are not embedded for the plan's recipe."
            if isinstance(plan.training, TrendsTraining):
                reason = (
                    f"the searches of {plan.training.days} days from {plan.training.first_day} on can't be counted: "
                    "these days are not over, no longer kept, or another plan's, or the counts can't be read."
                )
            raise _Declines(DeclineCode.UNAVAILABLE, reason)
        return plan

    def _believed_directory(self, invitation: Invitation, plan: Plan) -> Directory:
        """Return the directory, once it is the league's, of this league, in date, and no earlier than any seen."""
        try:
            charters = invitation.signed_directory.follow(self._league.charter)
            if self._league.operator_key in charters[-1].holders:
                raise DirectoryRefused(
                    "the operator is one of those who hold the league's key and could admit invented members."
                )
            directory = invitation.signed_directory.open(self._league.charter, self._clock())
            if directory.league != plan.league:
                raise DirectoryRefused(
                    f"found the directory of {directory.league}, expected {plan.league}'s."
                )
            if signing.public_bytes(self._identity) not in directory.entities(self._clock()):
                raise DirectoryRefused("this shop is not in the league's directory, or no longer.")
            self._markers.see_directory(directory, charters)
        except (SignatureInvalid, DirectoryRefused) as error:
            raise _Declines(DeclineCode.DIRECTORY, str(error)) from None
        return directory

    def _ledger_says(self, ask: Callable[[Charge], Spent], plan: Plan, work: Work) -> None:
        """Let the ledger check or charge the work, and turn what it refuses into a refusal."""
        try:
            ask(Charge.of(plan, work.round, work.attempt, plan.training.steps_per_round))
        except Repeated as error:
            raise _Declines(DeclineCode.REPEATED, str(error)) from None
        except BudgetExceeded as error:
            raise _Declines(DeclineCode.BUDGET, str(error)) from None

    def _in_terms_of_the_league(self, refusal: Refusal) -> _Declines:
        """Return what secure aggregation refused, with the culprit's identity for its place in the roster."""
        code = DeclineCode.UNEXPECTED if refusal.fault is Fault.ORDER else DeclineCode(refusal.fault.value)
        roster = self._session.roster if self._session else ()
        culprit = b"" if refusal.culprit is None else roster[refusal.culprit]
        return _Declines(code, str(refusal), culprit)


def accepted_plan(signed_plan: SignedPlan, operator_key: bytes, policy: Policy, taxonomy: Taxonomy) -> Plan:
    """Return the plan, once the operator signed it and the policy allows it.

    Raises `SignatureInvalid`, `WireError` when it is no plan, `PlanRefused` with every reason.
    """
    plan = signed_plan.open(operator_key)
    policy.check(plan, taxonomy)
    return plan


def _until_slot(elapsed: float, slot: float) -> float:
    """Return how long to wait so that a whole number of slots, at least one, has passed since training began, in s."""
    if slot == 0:
        return 0.0
    # A rounding must not make it negative: nobody can wait for that.
    return max(0.0, max(1, math.ceil(elapsed / slot)) * slot - elapsed)


def printable(reason: str) -> str:
    """Return `reason` for the owner's log: it may quote what the server sent, at any length, escape codes too."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in reason[:MAX_REASON])
