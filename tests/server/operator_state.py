"""A league in the middle of its life, for the operator's page: 12 merchants, 60 rounds, evaluations, versions.

The records are written by the code that writes them in a server; what is made up is who was there, and the photos.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common.directory import Directory, Entry
from hanse_common.evaluation import Layout
from hanse_common.evaluation_estimate import estimate
from hanse_common.federated_report import FederatedReport
from hanse_common.messages import DeclineCode
from hanse_common.modes import DistributedTraining, EvaluationTraining
from hanse_common.plan import Cohort, Plan, SignedPlan, dimension_of
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.coordinator import RoundOutcome
from hanse_server.evaluations import described
from hanse_server.live import TRIPS, Live
from hanse_server.page_data import Reader
from hanse_server.publication import sign_release
from hanse_server.storage import Checkpoint, Database, Objects, State
from hanse_server.storage.state import storage_url

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NAMES = (
    "alder",
    "beech",
    "birch",
    "cedar",
    "elm",
    "fir",
    "hazel",
    "holly",
    "larch",
    "maple",
    "rowan",
    "willow",
)
CLASSES = ("T-shirt", "Trousers", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
LOOKS_LIKE = {0: 6, 2: 4, 4: 2, 6: 0, 5: 7, 7: 9, 9: 7, 3: 0}
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>'\""
MINUTE = 60.0


def plans(classes: tuple[str, ...] = CLASSES) -> tuple[Plan, Plan]:
    """A training's plan of 80 rounds, and its evaluation's."""
    recipe = Recipe(
        preprocessing=Preprocessing(size=28, channels=1),
        backbone=Scattering(scales=2, angles=8, groups=None, projection=Projection(dimensions=600)),
        model=Linear(),
    )
    taxonomy = Taxonomy(classes=classes)
    cohort = Cohort(min_merchants=8, max_merchants=16, max_corrupt=2)
    training = DistributedTraining(
        rounds=80,
        repeats=8,
        sampling_rate=0.05,
        expected_batch=3000.0,
        clipping_norm=1.0,
        noise_multiplier=1.1,
    )
    evaluation = EvaluationTraining(
        rounds=16, repeats=1, unit="photo", expected_batch=12_000.0, noise_multiplier=16.0
    )

    def made(training: DistributedTraining | EvaluationTraining) -> Plan:
        return Plan(
            league="textiles",
            serial=bytes(16),
            recipe=recipe,
            taxonomy=taxonomy,
            dimension=dimension_of(training, recipe, len(classes)),
            training=training,
            cohort=cohort,
            delta=1e-5,
        )

    return made(training), made(evaluation)


def report(plan: Plan, skill: float, rng: np.random.Generator, photos: int = 12_000) -> FederatedReport:
    """Figures of a made-up recognizer of this `skill`, with the noise that the plan asks of ten merchants."""
    classes = len(plan.taxonomy.classes)
    labels = rng.integers(0, classes, photos)
    logits = rng.normal(size=(photos, classes))
    logits[np.arange(photos), labels] += skill
    for true, like in LOOKS_LIKE.items():
        if max(true, like) < classes:
            logits[labels == true, like] += 0.62 * skill
    scores = np.exp(1.15 * logits)
    scores /= scores.sum(axis=1, keepdims=True)
    layout, mechanism = Layout(classes), plan.mechanism(1)
    total = layout.sum(labels, scores) * layout.grid.fine_unit
    noise = (10 * mechanism.noise.share**2) ** 0.5 * mechanism.grid.step
    return estimate(plan, total + rng.normal(0, noise, total.shape), 10)


class Story:
    """Tells a league's records. `now` is when it ends, seconds since 1970; a round takes four minutes."""

    def __init__(self, folder: Path, now: float, rounds: int = 60, every: int = 5) -> None:
        self.rounds, self._every = rounds, every
        self._time = now - (rounds + 1) * 4 * MINUTE
        url = storage_url(folder, None)
        folder.mkdir(parents=True, exist_ok=True)
        self.state = State(folder, Database(url, clock=lambda: self._time), Objects(folder / "objects"))
        self.rng = np.random.default_rng(7)
        self.plan, self.evaluation = plans()
        self._now = now

    def directory(self, expires: float, names: tuple[str, ...] = NAMES) -> None:
        """The league's directory."""
        entries = tuple(
            Entry(name=name, entity=name, identity=bytes([number]) * 32, expires=1 << 37)
            for number, name in enumerate(sorted(names))
        )
        self.state.history.see_directory(
            Directory(league="textiles", charter=bytes(32), version=7, expires=int(expires), entries=entries)
        )

    def tell(self, blamed: str = "sent another plan's update") -> None:
        """A training up to `rounds`; who broke the protocol is `blamed` for that."""
        state = self.state
        self.directory(self._now + 9 * 86_400)
        progress = state.progress(SignedPlan.sign(self.plan, KEY), self.plan)
        evaluation = state.progress(SignedPlan.sign(self.evaluation, KEY), self.evaluation)
        self._versions(progress.plan.digest)
        run = state.history.begin_run(self.plan.digest, 0)
        block = b""
        for round_, outcome in enumerate(self._outcomes(blamed)):
            if round_ % 20 == 0:
                if block:
                    state.history.move_block(block, "closed")
                block = bytes([round_]) * 16
                state.history.open_block(run, self.plan.digest, block, {"asked": len(NAMES)})
                state.history.move_block(block, "open", NAMES[:11])
                progress.next_attempt()
            self._time += 4 * MINUTE
            progress.release(round_, outcome, seconds=float(self.rng.uniform(90, 150)))
            model = np.full(4, float(round_))
            progress.apply(Checkpoint(round_ + 1, model, {}, model, 1))
            if (round_ + 1) % self._every == 0:
                number = evaluation.rounds_released()
                version, middle = divmod(round_ + 1, 15)
                digest = f"{1000 + round_ if middle else version:064x}"
                subject = {"training": self.plan.digest.hex(), "after": round_ + 1, "model": digest}
                evaluation.release(number, outcome, subject=subject)
                skill = 3.6 * (1 - np.exp(-(round_ + 4) / 16))
                evaluation.evaluated(number, report(self.evaluation, skill, self.rng).to_json())
        for number, name in enumerate(NAMES[::2]):
            state.history.spent(name, 1.1 + 0.13 * number + 0.9 * (number == 2))
        self._time = self._now

    def _versions(self, plan_digest: bytes) -> None:
        """Three versions of earlier plans and one of this one."""
        parent = None
        for number in range(1, 5):
            folder = self.state.folder / f"made-{number}"
            folder.mkdir()
            (folder / "card.json").write_text(json.dumps({"number": number}))
            (folder / "model.safetensors").write_bytes(bytes([number]) * 64)
            made = self.state.versions.add(folder, plan_digest, parent, bytes(31) + bytes([number]))
            reason = ("first league", "better shoes", "coats were taken for pullovers")[(number - 1) % 3]
            if number < 4:
                signed, count = sign_release(made, self.state.versions, KEY, "textiles", reason)
                self.state.versions.release(made.digest, signed, count, reason, back=False)
            parent = made.digest
            self._time += MINUTE

    def _outcomes(self, blamed: str) -> Iterator[RoundOutcome]:
        for round_ in range(self.rounds):
            there = [name for name in NAMES if name != "rowan" or round_ > 6]
            lost = [name for name in there if self.rng.random() < (0.16 if name == "holly" else 0.025)]
            declined = {"fir": DeclineCode.POLICY} if round_ % 20 > 15 else {}
            accused = {"elm": blamed} if round_ == 54 else {}
            uploaded = sorted(set(there) - set(lost) - set(declined) - set(accused))
            yield RoundOutcome(
                update=np.zeros(4),
                uploaded=tuple(uploaded),
                dropped=tuple(sorted(set(lost) - set(declined) - set(accused))),
                declined=declined,
                blamed=accused,
                norm=float(self.rng.uniform(40, 46)),
                bound=71.0,
            )

    def live(self) -> Live:
        """What goes on in the round after the last one."""
        live = Live()
        rng = self.rng
        live.note(
            run=1,
            phase="training",
            round=self.rounds,
            rounds=80,
            listed=NAMES,
            online=NAMES[:11],
            connected=NAMES[:11],
            needed=8,
        )
        for kind, answered in zip(TRIPS, (11, 11, 11, 7), strict=False):
            live.trip(kind, answered, 11)
        place = np.arange(4096)
        smooth = 900 * np.sin(place % 64 / 9) * np.cos(place // 64 / 7) + rng.normal(0, 330, 4096)
        live.watch("cedar", rng.integers(0, 1 << 32, 4096, dtype=np.uint64).astype(np.uint32))
        live.watch("", np.rint(smooth).astype(np.int32).view(np.uint32))
        reader, plan = Reader(self.state), self.plan.digest.hex()
        last = reader.rounds(plan, 1)[0]
        missing = "".join(f" {name} dropped out." for name in last.roles["dropped"])
        missing += "".join(f" {name} declined ({code})." for name, code in last.roles["declined"].items())
        tried = [(one.after, reader.report(one.number)) for one in reader.evaluations(plan, 1)]
        for ago, kind, text in (
            (4 * self.rounds + 2, "listening", "Merchants' nodes: port 9092. Streams: port 9093."),
            (4 * self.rounds, "merchants", "11 of 12 merchants are there; rowan is missing."),
            *((2, "evaluated", f"After round {after}: {described(found)}") for after, found in tried),
            (1, "spent", "rowan has spent ε = 1.750 in all."),
            (0, "round", f"Round {self.rounds} of 80: {last.count('uploaded')} merchants.{missing}"),
        ):
            live.line(self._now - ago * MINUTE, kind, text)
        return live
