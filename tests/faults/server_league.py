"""A whole training with evaluations, in which the server dies and is started again; its merchants live on.

    training = ServerTraining(folder, at=place)      # the server dies there, and goes on from what is on its disk
    training.run()
    training.broken                                  # what was not kept, in words; nothing, if all is well

Four merchants train for three rounds, and try the model after the second and at the end. They are real ones, in this
process; the server is a child process, spoken to over a pipe, with its state in files. What the server came to is held
against what the merchants here know for themselves: what they were asked, paid, sent and helped to unmask.

What must hold, wherever the server died:

- **It goes on.** The second life ends the training: with the plan's rounds, one candidate, and everything beside it.
- **No recorded sum is lost or applied twice.** What was recorded when it died is there in the end as it was, and the
  model is the one that follows from each recorded sum once, in order, and from no other: not from one that was opened
  and not recorded. Merchants were never shown another.
- **Every upload stays charged.** Each has its charge, at each merchant, and a crash costs each merchant one more at
  most, in one round. The server's records of who took part agree with that.
- **Nothing is asked twice.** Attempts only grow, and each was recorded before anybody heard of it.
- **Evaluations count once.** Each model that was tried has one record, of the sum that the merchants helped to open.
- **The files are whole.** The audit log verifies and goes on from where it was; no object is missing or left over.
"""

import shutil
import sqlite3
from collections import Counter, defaultdict
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from points import Place, Points
from server_setting import (
    EVALUATION,
    EVERY,
    HONEST,
    MEMBERS,
    OPTIMIZER,
    PLAN,
    PLANS,
    ROUNDS,
    TAIL,
    Merchant,
    ServerVariant,
)
from server_victim import WATCHED, Died, Server
from setting import NAMES

from hanse_common import messages, wire
from hanse_common.errors import HanseError
from hanse_common.evaluation_estimate import estimate
from hanse_common.messages import Declined, Invitation, Start
from hanse_common.secagg.messages import (
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Ready,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Upload,
)
from hanse_common.vision import model as models
from hanse_common.vision.recognizer import Recognizer
from hanse_server.audit import verify
from hanse_server.averaging import TailAverage
from hanse_server.optimizers import create
from hanse_server.storage import State
from hanse_server.training import model_digest

QUESTIONS = (Invitation, Roster, Delivery, Start, Survivors, Agreement)
ANSWERS = (Joined, Shares, Ready, Upload, Agreed, Unmasked, Declined)
LEFT = {
    "hanse.sqlite", "hanse.sqlite-wal", "hanse.sqlite-shm", "hanse.sqlite.lock", "lock", "objects", "recognizer",
}  # fmt: skip
"""All that may lie in the folder of a state when a training is over."""

NAME_OF = MEMBERS.names

Work = tuple[bytes, int, int]
"""A plan's digest, a round, an attempt."""

Rows = list[tuple[Any, ...]]


class ServerTraining:
    """One training in which the server dies at `at`, or lives when that is None. `broken` says what was not kept.

    It dies once more at `again`, a place of its life after that. `met` are the places of its last life, when that is
    the first or `keeps_places` is set.
    """

    def __init__(
        self,
        folder: Path,
        at: Place | None = None,
        variant: ServerVariant = HONEST,
        again: Place | None = None,
        keeps_places: bool = False,
    ) -> None:
        self._deaths = [place for place in (at, again) if place is not None]
        self.broken: list[str] = []
        self.met: list[Place] = []
        self.unrecorded: set[Work] = set()
        """Sums that merchants helped to open and that the server died before it recorded."""
        self._variant = variant
        self._keeps_places = keeps_places
        self._state = folder / "server"
        self._merchants = {name: Merchant(folder / name, name) for name in NAMES}
        self._server = Server(self._state, variant, self._answer)
        self._attempts: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        self._shown: dict[Work, set[bytes]] = defaultdict(set)
        self._uploads: dict[Work, set[str]] = defaultdict(set)
        self._named: dict[Work, set[tuple[int, ...]]] = defaultdict(set)
        self._helped: dict[Work, set[str]] = defaultdict(set)
        self._rosters: dict[tuple[bytes, int], list[str]] = {}
        self._recorded: dict[str, Rows] = {}

    def run(self) -> None:
        """Train to the end, whatever happens to the server, and hold what happened against the promises."""
        files = (*WATCHED, *self._variant.source)
        try:
            for place in self._deaths:
                with suppress(Died):
                    self._server.live(Points(files, place, lines=False))
                    raise RuntimeError(f"it never came to {place}")
                self._recorded = _rows(self._state)
            keeps = self._keeps_places or not self._deaths
            self.met = self._server.live(Points(files if keeps else (), lines=False))
        except RuntimeError as error:
            self.broken.append(f"does not go on: {error}")
            return
        try:
            with State.open(self._state) as state:
                self._check_records(state)
                self._check_model(state)
                self._check_evaluations(state)
                self._check_versions(state)
                self._check_files(state)
        except HanseError as error:
            self.broken.append(f"half-written: {error}")
        self._check_charges()
        self._check_questions()

    # The merchants, and what they know.

    def _answer(self, name: str, payload: bytes) -> bytes:
        merchant = self._merchants[name]
        asked = wire.decode_any(QUESTIONS, payload, messages.MAX_MESSAGE_BYTES)
        work: Work = (asked.plan_digest, asked.round, asked.attempt)
        merchant.attempt = asked.attempt
        answer = merchant.participant.handle(payload)
        said = wire.decode_any(ANSWERS, answer, messages.MAX_MESSAGE_BYTES)
        if isinstance(said, Declined):
            self.broken.append(f"asked twice: {name} declines {_name(work)}: {said.code}")
        match asked:
            case Invitation():
                heard = self._attempts[asked.plan_digest]
                if not heard or heard[-1] != (self._server.lives, asked.attempt):
                    heard.append((self._server.lives, asked.attempt))
                if asked.attempt not in _attempts(self._state, asked.plan_digest):
                    self.broken.append(f"asked twice: {_name(work)} was not recorded before it was asked for")
            case Roster():
                names = [NAME_OF[member.identity] for member in asked.members]
                self._rosters[work[0], work[2]] = names
            case Start():
                self._shown[work].add(asked.model)
            case Survivors():
                self._named[work].add(asked.places)
        if isinstance(said, Upload):
            self._uploads[work].add(name)
            if work not in merchant.charged():
                self.broken.append(f"undercounted: {_name(work)} left {name} without a charge")
        if isinstance(said, Unmasked):
            self._helped[work].add(name)
        return answer

    def _opened(self, work: Work) -> tuple[NDArray[np.float64], tuple[str, ...]] | None:
        """Return the sum that the merchants helped to open, shape (d,), float64, and whose updates are in it."""
        plan = PLANS[work[0]]
        roster = self._rosters.get((work[0], work[2]), [])
        if not roster or len(self._helped[work]) < plan.cohort.parameters.threshold(len(roster)):
            return None
        (places,) = self._named[work]
        names = tuple(sorted(roster[place] for place in places))
        total = np.zeros(plan.dimension, np.uint32)
        for name in names:
            total += self._merchants[name].sent[work]
        return plan.decode(total, len(names)), names

    # What must hold when all is over.

    def _check_records(self, state: State) -> None:
        """Hold the rounds that are recorded against those that merchants helped to open."""
        rows = _rows(self._state)
        for table in ("round", "evaluation", "version"):
            for row in self._recorded.get(table, []):
                if row not in rows[table]:
                    self.broken.append(f"a record is lost: {table} {row}")
        before, after = self._recorded.get("audit", []), rows["audit"]
        if after[: len(before)] != before:
            self.broken.append("a record is lost: the audit log does not go on from where it was")
        try:
            verify(state.audit.entries())
        except HanseError as error:
            self.broken.append(f"half-written: {error}")
        for plan in PLANS.values():
            found = [row for row in rows["round"] if row[0] == plan.digest.hex()]
            wanted = ROUNDS if plan is PLAN else 2
            if [row[1] for row in found] != list(range(wanted)):
                self.broken.append(f"rounds: found {[row[1] for row in found]}, expected {wanted}")
            recorded = {(plan.digest, round_, attempt) for _, round_, attempt, _ in found}
            for work in recorded:
                opened = self._opened(work)
                took_part = tuple(
                    sorted(n for p, r, n in rows["participant"] if (p, r) == (work[0].hex(), work[1]))
                )
                if opened is None:
                    self.broken.append(f"a sum that nobody opened: {_name(work)}")
                elif opened[1] != took_part:
                    self.broken.append(f"{_name(work)}: took part {took_part}, merchants say {opened[1]}")
            self.unrecorded |= {
                work
                for work in self._helped
                if work[0] == plan.digest and self._opened(work) and work not in recorded
            }
        if len(self.unrecorded) > len(self._deaths):
            self.broken.append(f"sums were opened and not recorded: {[*map(_name, self.unrecorded)]}")
        unfinished = [row for row in rows["state"] if row[1] in ("running", "gathering", "open")]
        if unfinished or rows["unapplied"]:
            self.broken.append(f"left open: {unfinished + rows['unapplied']}")
        for plan in PLANS.values():
            heard = [number for _, number in self._attempts[plan.digest]]
            numbers = _attempts(self._state, plan.digest)
            if numbers != list(range(len(numbers))) or not set(heard) <= set(numbers):
                self.broken.append(f"attempts: recorded {numbers}, merchants heard of {heard}")

    def _check_model(self, state: State) -> None:
        """Train once more from the recorded sums alone, without a server, and compare."""
        rounds = [row for row in _rows(self._state)["round"] if row[0] == PLAN.digest.hex()]
        seed = int.from_bytes(PLAN.digest[:8], "big") >> 1
        model = models.initial_vector(PLAN.recipe, len(PLAN.taxonomy.classes), seed).astype(np.float64)
        optimizer, average = create(OPTIMIZER), TailAverage(ROUNDS, TAIL, PLAN.dimension)
        self._published = {}
        for _, round_, attempt, _ in rounds:
            shown = {
                m for work, found in self._shown.items() if work[:2] == (PLAN.digest, round_) for m in found
            }
            if shown != {messages.model_to_bytes(model.astype(np.float32))}:
                self.broken.append(f"round {round_} was asked from another model")
            opened = self._opened((PLAN.digest, round_, attempt))
            if opened is None:
                return
            model = optimizer.step(model, opened[0])
            average.add(round_, model)
            self._published[round_ + 1] = average.value(model).astype(np.float32)
        found = state.checkpoint(PLAN.digest)
        if found is None or found.rounds_done != ROUNDS:
            self.broken.append("the checkpoint is not that of the last round")
            return
        same = np.array_equal(found.model, model) and np.array_equal(found.average_total, average.total)
        same = (
            same and found.average_count == average.count and found.optimizer.keys() == optimizer.state.keys()
        )
        if not same or not all(
            np.array_equal(found.optimizer[name], a) for name, a in optimizer.state.items()
        ):
            self.broken.append("the model does not follow from the recorded sums, each once")

    def _check_evaluations(self, state: State) -> None:
        wanted = [EVERY, ROUNDS]
        records = state.history.evaluations(PLAN.digest)
        if [record.after for record in records] != wanted:
            self.broken.append(f"evaluations: found {[r.after for r in records]}, expected {wanted}")
            return
        rounds = {row[1]: row for row in _rows(self._state)["round"] if row[0] == EVALUATION.digest.hex()}
        for record in records:
            work = (EVALUATION.digest, record.round, rounds[record.round][2])
            opened = self._opened(work)
            model = self._published.get(record.after)
            if opened is None or model is None:
                continue
            shown = {m for w, found in self._shown.items() if w[:2] == work[:2] for m in found}
            if record.model != model_digest(model).hex() or shown != {messages.model_to_bytes(model)}:
                self.broken.append(f"the evaluation after {record.after} rounds is of another model")
            if record.report != estimate(EVALUATION, opened[0], len(opened[1])).to_json():
                self.broken.append(f"the figures after {record.after} rounds are not those of the sum")

    def _check_versions(self, state: State) -> None:
        found = state.versions.all()
        if len(found) != 1 or found[0].state != "candidate":
            self.broken.append(f"versions: found {[one.number for one in found]}, expected one candidate")
            return
        recognizer = Recognizer.load(self._state / "recognizer")
        if recognizer.digest().hex() != found[0].digest:
            self.broken.append("the recognizer's folder does not hold the candidate")
        for digest in found[0].files.values():
            state.objects.get(digest)
        final = self._published.get(ROUNDS)
        if final is not None and not np.array_equal(recognizer.vector, final):
            self.broken.append("the candidate is not the model that was trained")

    def _check_files(self, state: State) -> None:
        with state.alone():
            if gone := state.collect():
                self.broken.append(f"left over: {gone} objects that no record names")
        litter = {path.name for path in self._state.iterdir()} - LEFT
        litter |= {path.name for path in (self._state / "recognizer").glob(".*")}
        if litter:
            self.broken.append(f"left over: {sorted(litter)}")

    def _check_charges(self) -> None:
        sent = [work for work, names in self._uploads.items() for _ in names]
        for name, merchant in self._merchants.items():
            charged = merchant.charged()
            if len(set(charged)) != len(charged) or set(charged) != set(merchant.sent):
                self.broken.append(f"undercounted: {name} paid for {len(charged)} of {len(merchant.sent)}")
            if missing := {work for work in sent if name in self._uploads[work]} - set(charged):
                self.broken.append(f"undercounted: {name} sent {[*map(_name, missing)]} without a charge")
            times = Counter(work[:2] for work in charged)
            again = [count - 1 for count in times.values() if count > 1]
            if sum(again) > len(self._deaths) or len(times) != ROUNDS + 2:
                self.broken.append(f"{name} paid more than a crash can cost: {sorted(times.values())}")

    def _check_questions(self) -> None:
        for heard in self._attempts.values():
            if [number for _, number in heard] != sorted({number for _, number in heard}):
                self.broken.append(f"asked twice: (life, attempt) {heard}")
        for work, places in self._named.items():
            if len(places) > 1:
                self.broken.append(f"asked twice: survivors of {_name(work)}")


def _name(work: Work) -> str:
    return f"{PLANS[work[0]].training.mode} round {work[1]}, attempt {work[2]}"


QUERIES = {
    "round": 'SELECT plan, number, attempt, "update" FROM round ORDER BY plan, number',
    "unapplied": "SELECT plan, number, state FROM round WHERE state != 'applied'",
    "participant": "SELECT plan, round, name FROM participant WHERE role = 'uploaded'",
    "evaluation": "SELECT number, plan, round, after, model, report FROM evaluation ORDER BY number",
    "version": "SELECT number, digest, model FROM version ORDER BY number",
    "audit": "SELECT * FROM audit ORDER BY sequence",
    "state": "SELECT number, state FROM run UNION ALL SELECT id, state FROM block",
}


def _rows(folder: Path) -> dict[str, Rows]:
    """Return what is on the server's disk, by another reader than the server's own."""
    return {table: _query(folder, query) for table, query in QUERIES.items()}


def _attempts(folder: Path, plan: bytes) -> list[int]:
    rows = _query(folder, "SELECT number FROM attempt WHERE plan = ? ORDER BY number", plan.hex())
    return [number for (number,) in rows]


def _query(folder: Path, query: str, *arguments: str) -> Rows:
    path = folder / "hanse.sqlite"
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            return db.execute(query, arguments).fetchall()
    except sqlite3.Error:
        return []


def trained(folder: Path, *arguments: Any, **options: Any) -> ServerTraining:
    """Return a `ServerTraining` of these arguments that is over, in a folder that is gone."""
    folder.mkdir()
    try:
        training = ServerTraining(folder, *arguments, **options)
        training.run()
        return training
    finally:
        shutil.rmtree(folder)
