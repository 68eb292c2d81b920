"""A merchant in one of Ray's workers: each message is answered from the experiment's folder alone.

    reply = answer(folder, embeddings, partition, wire.encode(order))

A worker serves whichever merchant's message comes next. It keeps those that it has made, which saves time and
carries nothing over: a round's randomness begins anew with each order, what was paid is in the ledger on disk.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from hanse_client.charges import Charge
from hanse_client.ledger import Ledger, Repeated
from hanse_client.training import ShopTrainer
from hanse_common import messages, signing, wire
from hanse_common.config import load
from hanse_common.errors import BudgetExceeded, ConfigError, HanseError, WireError
from hanse_common.files import read_bounded
from hanse_common.messages import MAX_MESSAGE_BYTES, DeclineCode
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_common.secagg.messages import Work
from hanse_common.secagg.ring import MAX_VECTOR_BYTES
from hanse_common.vision.recognizer import WHITENING_FILE
from hanse_simulations.experiment import CONFIG_FILE, Experiment
from hanse_simulations.seeded import RoundRandomness
from hanse_simulations.shops import make_shop, merchant_names
from hanse_simulations.simulation import ledger_path, operator_key, simulated_policy

PLAN_FILE = "plan.hanse"

MAX_TOLD = 2000
"""Bound of what a merchant's owner is told, in characters."""

DEVICE = "cpu"
"""Ray hides a GPU from workers that did not reserve one."""


class Order(Work):
    """The server asks a merchant to train from `model`, 4·d bytes of float32. Everything else is in the folder."""

    kind: ClassVar[int] = 40

    model: Annotated[bytes, Field(max_length=MAX_VECTOR_BYTES)]


class Answer(Work):
    """The client update as residues of the plan's ring, 4·d bytes of uint32, or none and why.

    `told` is what its owner, who is the researcher here, would find in the merchant's log.
    """

    kind: ClassVar[int] = 41

    merchant: Annotated[str, Field(max_length=63)]
    vector: Annotated[bytes, Field(max_length=MAX_VECTOR_BYTES)]
    code: Annotated[DeclineCode, Field(strict=False)] | None
    told: Annotated[str, Field(max_length=MAX_TOLD)]


def answer(folder: Path, embeddings: Path, partition: int, request: bytes) -> bytes:
    """Return the answer of merchant number `partition`, from 0, to an `Order`.

    `folder` is the experiment's, `embeddings` is their cache. What a merchant cannot do is an answer, too.

    Raises `WireError` when `request` is no order.
    """
    torch.set_num_threads(1)  # as in the engine in one process; there is a worker for each core
    order = wire.decode(Order, request, MAX_MESSAGE_BYTES)
    vector, code = b"", None
    with _overheard() as told:
        try:
            vector = _merchant(folder, embeddings, partition).train(order)
        except Exception as error:  # what a worker raises is a trace of Ray's; say what happened instead
            code = next((code for kind, code in CODES.items() if isinstance(error, kind)), None)
            code = code or DeclineCode.UNAVAILABLE
            told.append(f"declined ({code}): {error if isinstance(error, HanseError) else repr(error)}")
    name = _merchant_name(folder, partition)
    said = " ".join(told)[:MAX_TOLD]
    return wire.encode(Answer(**order.work, merchant=name, vector=vector, code=code, told=said))


CODES = {
    Repeated: DeclineCode.REPEATED,
    BudgetExceeded: DeclineCode.BUDGET,
    WireError: DeclineCode.MALFORMED,
}


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """Collect what is logged in the body as a warning or worse; a worker's own output is seen by nobody."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)

    def emit(record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        told.append(record.getMessage() + (f" ({cause!r})" if cause else ""))

    handler.emit = emit  # type: ignore[method-assign]
    logger = logging.getLogger("hanse_client")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


@dataclass(frozen=True)
class _Merchant:
    plan: Plan
    ledger: Ledger
    trainer: ShopTrainer
    randomness: RoundRandomness

    def train(self, order: Order) -> bytes:
        """Charge the ledger, then return the update's residues, 4·d bytes. Raises what stands in the way."""
        if order.plan_digest != self.plan.digest:
            raise WireError("the order is for another plan than the folder's.")
        model = messages.model_from_bytes(order.model, self.plan.model_dimension)
        steps = self.plan.training.steps_per_round
        self.ledger.charge(Charge.of(self.plan, order.round, order.attempt, steps))
        self.randomness.begin(order.round)
        return ring.to_bytes(self.trainer.contribution(self.plan, order.round, model))


@cache
def _experiment(folder: Path) -> Experiment:
    return load(Experiment, folder / CONFIG_FILE)


def _merchant_name(folder: Path, partition: int) -> str:
    return merchant_names(_experiment(folder).data.merchants)[partition]


@cache  # as many as the experiment has, whose photos together are those of one dataset
def _merchant(folder: Path, embeddings: Path, partition: int) -> _Merchant:
    """Make the merchant, with its photos out of the cache of embeddings."""
    experiment = _experiment(folder)
    data = read_bounded(folder / PLAN_FILE, wire.MAX_DOCUMENT_BYTES, "the experiment's plan", ConfigError)
    signed_plan = wire.decode(SignedPlan, data)
    plan = signed_plan.open(signing.public_bytes(operator_key(experiment)))
    policy = simulated_policy(experiment)
    policy.check(plan, experiment.plan.taxonomy)
    name = _merchant_name(folder, partition)
    # The plan has the whitening that was fitted to the public photos; the file does not.
    settings = experiment.plan.model_copy(update={"recipe": plan.recipe})
    experiment = experiment.model_copy(update={"plan": settings})
    examples = make_shop(experiment, name, embeddings, folder / WHITENING_FILE, DEVICE)
    randomness = RoundRandomness(experiment.seed, f"merchant {name}")
    return _Merchant(
        plan,
        Ledger(ledger_path(folder, name), policy.budget),
        ShopTrainer(plan.recipe, plan.taxonomy, examples, randomness),
        randomness,
    )
