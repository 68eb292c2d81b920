"""A merchant's side of a round: bytes in, bytes out. Read `handle`, then `_join`, then `_upload`.

    participant = Participant(operator_key, policy, taxonomy, ledger, trainer)
    reply = participant.handle(request)

The participant knows neither Flower nor the network. Whatever arrives is untrusted; whatever it answers is a
typed message without text. Refusals are decided before any photo is read, and their codes depend on the plan,
the policy and the ledger, never on a photo. The order of an upload is: charge the ledger and sync it, then
touch the photos.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanse_client.charges import Charge, Spent
from hanse_client.ledger import Ledger, Repeated
from hanse_client.policy import Policy
from hanse_client.training import Trainer
from hanse_common import messages, wire
from hanse_common.errors import BudgetExceeded, LedgerError, PlanRefused, SignatureInvalid, WireError
from hanse_common.messages import DeclineCode, Declined, Invitation, Joined, Start, Upload, Work
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_common.vision.taxonomy import Taxonomy

log = logging.getLogger(__name__)

MAX_REASON = 4000
"""Bound of the reason that the owner is told, in characters."""


class _Refusal(Exception):
    """The merchant does not go on; `code` is what the server hears."""

    def __init__(self, code: DeclineCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class _Joined:
    """A round this merchant has joined and not yet uploaded for."""

    work: dict[str, Any]
    plan: Plan
    model: NDArray[np.float32]


class Participant:
    """One merchant in one league.

    `tell` brings the owner what the server never hears, `on_upload` each upload's plan and round (from 0).
    """

    def __init__(
        self,
        operator_key: bytes,
        policy: Policy,
        taxonomy: Taxonomy,
        ledger: Ledger,
        trainer: Trainer,
        tell: Callable[[str], None] = log.warning,
        on_upload: Callable[[Plan, int], None] = lambda plan, round_: None,
    ) -> None:
        self._operator_key = operator_key
        self._policy = policy
        self._taxonomy = taxonomy
        self._ledger = ledger
        self._trainer = trainer
        self._tell = tell
        self._on_upload = on_upload
        self._joined: _Joined | None = None

    def handle(self, request: bytes) -> bytes:
        """Return the reply to `request`, untrusted bytes. Never raises for what the server may send."""
        work = Work(plan_digest=bytes(32), round=0, attempt=0)
        try:
            message: Invitation | Start = wire.decode_any(
                (Invitation, Start), request, messages.MAX_MESSAGE_BYTES
            )
            work = message
            if isinstance(message, Invitation):
                return wire.encode(self._join(message))
            return wire.encode(self._upload(message))
        except WireError as error:
            code, reason = DeclineCode.MALFORMED, str(error)
        except _Refusal as refusal:
            code, reason = refusal.code, str(refusal)
        self._tell(f"Declined round {work.round + 1} ({code}): {_shown(reason)}")
        return wire.encode(Declined(**work.work, code=code))

    def _join(self, invitation: Invitation) -> Joined:
        plan = self._accepted_plan(invitation)
        self._joined = None
        if invitation.round >= plan.training.rounds:
            raise _Refusal(
                DeclineCode.UNEXPECTED,
                f"the plan has {plan.training.rounds} rounds, and this would be round {invitation.round + 1}.",
            )
        try:
            model = messages.model_from_bytes(invitation.model, plan.dimension)
        except WireError as error:
            raise _Refusal(DeclineCode.MODEL, str(error)) from None
        self._ledger_says(self._ledger.check, plan, invitation)
        self._joined = _Joined(invitation.work, plan, model)
        return Joined(**invitation.work, model_digest=messages.model_digest(invitation.model))

    def _upload(self, start: Start) -> Upload:
        joined, self._joined = self._joined, None
        if joined is None or joined.work != start.work:
            raise _Refusal(DeclineCode.UNEXPECTED, "the server asked to train for a round not joined.")
        if start.cohort_size < self._policy.minimum_cohort:
            raise _Refusal(
                DeclineCode.POLICY,
                f"found a cohort of {start.cohort_size}, the policy needs {self._policy.minimum_cohort}.",
            )
        self._ledger_says(self._ledger.charge, joined.plan, start)
        # From here on photos are read. But for the time it takes, nothing that happens may show outside.
        update = self._trainer.update(joined.plan, start.round, joined.model)
        residues = joined.plan.ring.encode(update)
        self._on_upload(joined.plan, start.round)
        return Upload(**start.work, vector=ring.to_bytes(residues))

    def _accepted_plan(self, invitation: Invitation) -> Plan:
        """Return the plan, once the operator signed it, the policy allows it and the trainer knows it."""
        try:
            plan = accepted_plan(invitation.signed_plan, self._operator_key, self._policy, self._taxonomy)
        except SignatureInvalid as error:
            raise _Refusal(DeclineCode.SIGNATURE, str(error)) from None
        except PlanRefused as error:
            raise _Refusal(DeclineCode.POLICY, str(error)) from None
        if plan.digest != invitation.plan_digest:
            raise _Refusal(DeclineCode.MALFORMED, "the invitation names another plan than it carries.")
        if not self._trainer.accepts(plan):
            raise _Refusal(DeclineCode.UNAVAILABLE, "the photos are not embedded for the plan's recipe.")
        return plan

    def _ledger_says(self, ask: Callable[[Charge], Spent], plan: Plan, work: Work) -> None:
        """Let the ledger check or charge the work, and turn what it refuses into a refusal."""
        try:
            ask(Charge.of(plan, work.round, work.attempt, plan.training.local_steps))
        except Repeated as error:
            raise _Refusal(DeclineCode.REPEATED, str(error)) from None
        except BudgetExceeded as error:
            raise _Refusal(DeclineCode.BUDGET, str(error)) from None
        except LedgerError as error:
            raise _Refusal(DeclineCode.UNAVAILABLE, str(error)) from None


def accepted_plan(signed_plan: SignedPlan, operator_key: bytes, policy: Policy, taxonomy: Taxonomy) -> Plan:
    """Return the plan, once the operator signed it and the policy allows it.

    Raises `SignatureInvalid`, `WireError` when it is no plan, `PlanRefused` with every reason.
    """
    plan = signed_plan.open(operator_key)
    policy.check(plan, taxonomy)
    return plan


def _shown(reason: str) -> str:
    """Return `reason` for the owner's log: it may quote what the server sent, at any length, escape codes too."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in reason[:MAX_REASON])
