"""The plan, the merchants and their keys in miniature, and a trainer without photos."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from hanse_client.charges import Budget
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.participant import Participant, PinnedLeague
from hanse_client.policy import Policy
from hanse_common import signing
from hanse_common.charter import founded
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.modes import LocalTraining
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.coordinator import LeagueDirectory

ROUNDS, BLOCK = 3, 2
NAMES = ("alder", "birch", "cedar", "damson")
VICTIM = "birch"
OPERATOR, LEAGUE, *_KEYS = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 7))
IDENTITIES = dict(zip(NAMES, _KEYS, strict=True))
NOW = 1_800_000_000
TAXONOMY = Taxonomy(classes=("shirt", "shoe", "bag"))
POLICY = Policy(league="test", epsilon=6.0, delta=2e-5)
CHARTER = founded("test", LEAGUE)
PINNED = PinnedLeague(signing.public_bytes(OPERATOR), CHARTER.read().digest, TAXONOMY)
BUDGET = Budget(POLICY.epsilon, POLICY.delta)


def _plan() -> Plan:
    recipe = Recipe(
        preprocessing=Preprocessing(size=8, channels=1),
        backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=6)),
        model=Linear(),
    )
    training = LocalTraining(
        rounds=ROUNDS, local_steps=1, sampling_rate=0.2, expected_batch=20.0, clipping_norm=1.0,
        learning_rate=1000.0, update_bound=8.0, noise_multiplier=2.0,
    )  # fmt: skip
    return Plan(
        league="test", serial=bytes(16), recipe=recipe, taxonomy=TAXONOMY, dimension=recipe.dimension(3),
        training=training, delta=1e-5,
        cohort=Cohort(min_merchants=3, max_merchants=4, max_corrupt=1, upload_slot=0),
    )  # fmt: skip


PLAN = _plan()
SIGNED_PLAN = SignedPlan.sign(PLAN, OPERATOR)
_LISTED = Directory(
    league="test",
    charter=PINNED.charter,
    version=1,
    expires=NOW + 99,
    entries=tuple(
        Entry(name=name, entity=f"e{name}", identity=signing.public_bytes(key), expires=NOW + 99)
        for name, key in sorted(IDENTITIES.items())
    ),
)
DIRECTORY = LeagueDirectory(SignedDirectory.of(_LISTED, (CHARTER,)).signed_by(LEAGUE), _LISTED)


def update_of(name: str, round_: int) -> NDArray[np.uint32]:
    """Return what the merchant contributes to the round, without noise, as residues."""
    numbers = np.arange(PLAN.dimension) / 16 + 0.25 * NAMES.index(name) - 0.5 * round_
    return PLAN.encode(numbers)


class Stub:
    """A trainer without photos. `touch` is called where a real one begins to read them."""

    def __init__(self, name: str, touch: Callable[[int], None] = lambda round_: None) -> None:
        self._name = name
        self._touch = touch

    def accepts(self, plan: Plan) -> bool:
        return True

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        self._touch(round_)
        return update_of(self._name, round_)


@dataclass(frozen=True)
class Variant:
    """What a merchant is made of; a test of the harness itself puts something broken here."""

    ledger: Callable[[Path, Budget], Ledger] = Ledger
    markers: Callable[[Path], Markers] = Markers
    participant: type[Participant] = Participant
    source: tuple[Path, ...] = ()

    def open(self, folder: Path, name: str, trainer: Any) -> Participant:
        """Return the merchant's participant over the files in `folder`."""
        return self.participant(
            PINNED,
            POLICY,
            IDENTITIES[name],
            self.ledger(folder / "ledger.sqlite", BUDGET),
            self.markers(folder / "markers.sqlite"),
            trainer,
            tell=lambda reason: None,
            clock=lambda: NOW,
            wait=lambda seconds: None,
        )


HONEST = Variant()


def charged(folder: Path) -> list[tuple[int, int]]:
    """Return (round, attempt) of each charge on disk, by another reader than the ledger itself."""
    path = folder / "ledger.sqlite"
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            return db.execute("SELECT round, attempt FROM charge ORDER BY number").fetchall()
    except sqlite3.Error:
        return []
