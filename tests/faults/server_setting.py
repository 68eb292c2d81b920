"""A training with evaluations in miniature, its merchants, and the server's side of it as it is put together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import setting
from numpy.typing import NDArray
from setting import CHARTER, IDENTITIES, LEAGUE, NAMES, NOW, OPERATOR, PINNED

from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.participant import Participant
from hanse_client.policy import Policy
from hanse_common import signing
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.evaluation import Layout
from hanse_common.modes import EvaluationTraining
from hanse_common.plan import Plan, SignedPlan, dimension_of
from hanse_server.config import (
    AggregatorListener,
    Blocks,
    EvaluationSettings,
    Optimization,
    PrivacyTarget,
    ServerConfig,
    Service,
)
from hanse_server.coordinator import LeagueDirectory
from hanse_server.early_stop import EarlyStop
from hanse_server.storage import State
from hanse_server.training import Training

FOREVER = 1 << 37
ROUNDS, BLOCK, EVERY, TIMES = 3, 2, 2, 3
TAIL = 0.5
OPTIMIZER = {"name": "fedadam", "learning_rate": 0.1}
CLASSES = len(setting.TAXONOMY.classes)


def _plans() -> tuple[Plan, Plan]:
    training = setting.PLAN.model_copy(
        update={"training": setting.PLAN.training.model_copy(update={"repeats": 2})}
    )
    counts = EvaluationTraining(rounds=TIMES, repeats=2, expected_batch=200.0, noise_multiplier=20.0)
    evaluation = training.model_copy(
        update={
            "training": counts,
            "serial": bytes(15) + b"e",
            "dimension": dimension_of(counts, training.recipe, CLASSES),
        }
    )
    return Plan.model_validate(training.model_dump()), Plan.model_validate(evaluation.model_dump())


PLAN, EVALUATION = _plans()
SIGNED_PLAN, SIGNED_EVALUATION = (SignedPlan.sign(plan, OPERATOR) for plan in (PLAN, EVALUATION))
PLANS = {plan.digest: plan for plan in (PLAN, EVALUATION)}
POLICY = Policy(league="test", epsilon=30.0, delta=1e-4)
_LISTED = Directory(
    league="test",
    charter=PINNED.charter,
    version=1,
    expires=FOREVER,
    entries=tuple(
        Entry(name=name, entity=f"e{name}", identity=signing.public_bytes(key), expires=FOREVER)
        for name, key in sorted(IDENTITIES.items())
    ),
)
MEMBERS = LeagueDirectory(SignedDirectory.of(_LISTED, (CHARTER,)).signed_by(LEAGUE), _LISTED)


def update_of(
    plan: Plan, name: str, round_: int, attempt: int, model: NDArray[np.float32]
) -> NDArray[np.uint32]:
    """Return what the merchant contributes, as residues: another vector for each merchant, round, attempt and model."""
    place = NAMES.index(name)
    if plan is EVALUATION:
        labels = np.arange(50) % CLASSES
        right = (np.arange(50) + attempt + place) % 5 > 0
        scores = np.full((50, CLASSES), 0.1)
        scores[np.arange(50), np.where(right, labels, (labels + 1) % CLASSES)] = 0.8
        steps = Layout(CLASSES).sum(labels, scores) // plan.mechanism(1).grid.fine_per_step
        return steps.astype(np.uint32)  # modulo 2³²
    numbers = np.arange(plan.dimension) / 16 + 0.25 * place - 0.5 * round_ + 0.125 * attempt
    return plan.encode(numbers - 0.5 * model.astype(np.float64))


class Merchant:
    """One merchant's real participant, ledger and marks; `sent` are its contributions by (plan, round, attempt)."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.attempt = -1
        self.sent: dict[tuple[bytes, int, int], NDArray[np.uint32]] = {}
        self.ledger = Ledger(folder / "ledger.sqlite", POLICY.budget)
        self.participant = Participant(
            PINNED,
            POLICY,
            IDENTITIES[name],
            self.ledger,
            Markers(folder / "markers.sqlite"),
            self,
            tell=lambda reason: None,
            clock=lambda: NOW,
            wait=lambda seconds: None,
        )

    def accepts(self, plan: Plan) -> bool:
        return True

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        known = PLANS[plan.digest]
        residues = update_of(known, self.name, round_, self.attempt, model)
        self.sent[plan.digest, round_, self.attempt] = residues.copy()
        return residues

    def charged(self) -> list[tuple[bytes, int, int]]:
        """Return (plan, round, attempt) of each charge, once the whole ledger is verified."""
        self.ledger.verify()
        return [
            (event.charge.plan_digest, event.charge.round, event.charge.attempt)
            for event in self.ledger.events()
        ]


def config_of(state: Path) -> tuple[ServerConfig, Service]:
    """Return what an operator would have written, as far as anybody looks."""
    privacy = PrivacyTarget(epsilon=1.0)
    service = Service.model_construct(
        plan=Path("plan"), evaluation=Path("evaluation"), state=state, storage=None, whitening=None, centre=None,
        aggregator=AggregatorListener(address="localhost:1"),
        blocks=Blocks(rounds=BLOCK, patience=5.0, gather=5.0),
    )  # fmt: skip
    config = ServerConfig.model_construct(
        optimization=Optimization(
            optimizer=OPTIMIZER, attempts=1, tail_average=TAIL, early_stop=EarlyStop(patience=9)
        ),
        evaluation=EvaluationSettings(privacy=privacy, holdout=200.0, times=TIMES, every=EVERY),
        start=None,
        service=service,
    )
    return config, service


@dataclass(frozen=True)
class ServerVariant:
    """What a server keeps its records with; a test of the harness itself puts something broken here."""

    state: Callable[[Path], State] = State.open
    training: type[Training] = Training
    source: tuple[Path, ...] = ()


HONEST = ServerVariant()
