"""Merchants with a fault of the kind that the harness is there to find. Each must be found, or the harness is blind."""

import copyreg
import pickle
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from setting import OPERATOR, Variant

from hanse_client import ledger as ledger_module
from hanse_client.charges import Budget, Charge, Spent
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.participant import Participant
from hanse_common import messages
from hanse_common.messages import Start
from hanse_common.secagg import ring
from hanse_common.secagg.messages import Upload

_HERE = (Path(__file__),)


class LateLedger(Ledger):
    """Acknowledges a charge before it is written, and writes it when the next one comes."""

    _late: Charge | None = None

    def charge(self, charge: Charge) -> Spent:
        if self._late is not None:
            super().charge(self._late)
        self._late = charge
        return self.check(charge)


class ChargesAfterwards(Participant):
    """Looks at the photos, then pays."""

    def _upload(self, start: Start) -> Upload:
        session = self._joined(start)
        model = messages.model_from_bytes(start.model, session.plan.dimension)
        session.merchant.open_round(start.round, messages.model_digest(start.model))
        residues = self._trainer.contribution(session.plan, start.round, model)
        self._ledger_says(self._ledger.charge, session.plan, start)
        session.merchant.mask(residues)
        return Upload(**start.work, vector=ring.to_bytes(residues))


class ForgetfulMarkers(Markers):
    """Does not note which attempts it began."""

    def begin(self, plan_digest: bytes, attempt: int) -> None:
        """Do nothing."""


class LateMarkers(Markers):
    """Notes an attempt when it is next asked for something, after the answer."""

    _late: tuple[bytes, int] | None = None

    def begin(self, plan_digest: bytes, attempt: int) -> None:
        self._late = (plan_digest, attempt)

    def witnesses(self) -> dict[bytes, Any]:
        found = super().witnesses()
        if self._late is not None:
            super().begin(*self._late)
            self._late = None
        return found


class LedgerMadeInPlace(Ledger):
    """Makes the file where it is used, statement by statement."""

    def __init__(self, path: Path, budget: Budget) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                for statement in ledger_module._SCHEMA:
                    db.execute(statement)
                db.execute("INSERT INTO terms VALUES (?, ?)", (budget.accounting, budget.unit))
                db.execute(f"PRAGMA application_id = {ledger_module.APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {ledger_module.SCHEMA_VERSION}")
        super().__init__(path, budget)


class KeepsSecrets(Participant):
    """Keeps the set-up's secrets on disk after an upload, to go on with them after a crash."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._place = self._ledger.path.parent.parent / "secrets"
        if self._place.exists():
            self._session = pickle.loads(self._place.read_bytes())  # noqa: S301 - our own file

    def handle(self, request: bytes) -> bytes:
        answer = super().handle(request)
        if request[2] == Start.kind:
            self._place.write_bytes(pickle.dumps(self._session))
        return answer


for _kind, _sample in ((Ed25519PrivateKey, OPERATOR), (X25519PrivateKey, X25519PrivateKey.generate())):
    copyreg.pickle(
        type(_sample), lambda key, kind=_kind: (kind.from_private_bytes, (key.private_bytes_raw(),))
    )

BROKEN = {
    "acknowledges a charge before it is written": ("Start", Variant(ledger=LateLedger, source=_HERE)),
    "looks at photos, then pays": ("Start", Variant(participant=ChargesAfterwards, source=_HERE)),
    "forgets which attempts it began": ("Roster", Variant(markers=ForgetfulMarkers, source=_HERE)),
    "notes an attempt after the answer": ("Roster", Variant(markers=LateMarkers, source=_HERE)),
    "makes its ledger in place": ("open", Variant(ledger=LedgerMadeInPlace, source=_HERE)),
    "keeps secrets on disk": ("Agreement", Variant(participant=KeepsSecrets, source=_HERE)),
}
"""By what is wrong: in which phase a crash shows it, and the merchant."""
