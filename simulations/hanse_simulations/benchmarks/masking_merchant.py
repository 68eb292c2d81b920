"""A merchant for benchmarks: all of secure aggregation, and no policy, no ledger, no photos.

    answer = MaskingMerchant(identity).handle(question)

Its updates are zero.
"""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import wire
from hanse_common.directory import Directory
from hanse_common.messages import MAX_MESSAGE_BYTES, Invitation, Start, model_digest
from hanse_common.plan import Plan
from hanse_common.secagg import ring
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Agreement, Delivery, Roster, Survivors, Upload, Work
from hanse_common.secagg.suite import Setup
from hanse_common.wire import Buffer

_QUESTIONS: tuple[type[Work], ...] = (Invitation, Roster, Delivery, Start, Survivors, Agreement)


class MaskingMerchant:
    """Answers the questions of secure aggregation with the directory identity given."""

    def __init__(self, identity: Ed25519PrivateKey) -> None:
        self._identity = identity
        self._merchant: Merchant | None = None

    def handle(self, request: Buffer) -> bytes:
        """Return the answer to `request`. Raises `WireError` for what is no question."""
        return wire.encode(self._answer(*wire.decode_tailed(_QUESTIONS, request, MAX_MESSAGE_BYTES)))

    def _answer(self, message: Work, model: memoryview) -> Work:
        if isinstance(message, Invitation):
            directory = wire.decode(Directory, message.signed_directory.directory)
            plan = wire.decode(Plan, message.signed_plan.plan)
            setup = Setup(**message.work, rounds=message.rounds, directory_digest=directory.digest)
            parameters, entities = plan.cohort.parameters, directory.entities(0)
            self._merchant = Merchant(setup, parameters, self._identity, entities)
            return self._merchant.join()
        if self._merchant is None:
            raise ValueError("Expected an invitation first.")
        match message:
            case Roster():
                return self._merchant.share(message, 0, {})
            case Delivery():
                return self._merchant.receive(message)[1]
            case Start():
                self._merchant.open_round(message.round, model_digest(model))
                residues = np.zeros(len(model) // 4, dtype=np.uint32)
                self._merchant.mask(residues)
                return Upload(**message.work, vector=ring.to_bytes(residues))
            case Survivors():
                return self._merchant.agree(message)
            case Agreement():
                return self._merchant.unmask(message)
        raise ValueError("Expected a question of secure aggregation.")
