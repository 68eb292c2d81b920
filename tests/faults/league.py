"""A league in miniature, without torch: the real coordinator, real participants, and one of them in its own process.

    training = Training(folder, at=place)      # the victim dies there, is started again, and the training goes on
    training.run()
    training.broken                            # what was not kept, in words; nothing, if all is well

Four merchants train for three rounds: a set-up of two rounds, then one of one. The victim is a child process, spoken
to over a pipe, with its ledger and marks in files. When it dies, it is started again on the same files, and the server
turns hostile: it asks everything again that it ever asked, beginning with other survivors. Then the training goes on.

What must hold, wherever the victim died:

- **The budget is never undercounted.** Whatever left the victim has its charge on disk when it leaves, and the charge
  was there when the photos were touched; every touch is still charged when all is over, and none twice.
- **Nothing is answered twice.** All answers to one question, over all lives, are the same bytes, and of no
  merchant's secrets of a round is both the seed's and the key's share revealed.
- **No half-written file is used.** Ledger and marks open, verify, and have no litter beside them that matters.
- **The league goes on.** The training ends, each sum is that of its survivors' updates exactly, and the last
  round has the victim again.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from points import Place, Points
from setting import (
    BLOCK,
    BUDGET,
    DIRECTORY,
    HONEST,
    NAMES,
    NOW,
    PLAN,
    ROUNDS,
    SIGNED_PLAN,
    VICTIM,
    Stub,
    Variant,
    charged,
    update_of,
)
from victim import QUESTIONS, WATCHED, Died, Victim

from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_common import messages, wire
from hanse_common.errors import HanseError
from hanse_common.messages import Declined
from hanse_common.secagg import transcript
from hanse_common.secagg.messages import (
    OPENING_BYTES,
    Agreed,
    Joined,
    Ready,
    Shares,
    Survivors,
    Unmasked,
    Upload,
    Work,
)
from hanse_server.coordinator import MaskedRounds
from hanse_server.league import RoundReport, train
from hanse_server.optimizers import create
from hanse_server.storage import State

ANSWERS = (Joined, Shares, Ready, Upload, Agreed, Unmasked, Declined)
STATE = {f"{name}.sqlite{end}" for name in ("ledger", "markers") for end in ("", "-wal", "-shm")}


class Training:
    """One training in which the victim dies at `at`, or lives when that is None. `broken` says what was not kept.

    It dies once more at `again`, a place of its being started again. `met` are the places of its last life, when that
    is the first or `keeps_places` is set.
    """

    def __init__(
        self,
        folder: Path,
        at: Place | None = None,
        variant: Variant = HONEST,
        again: Place | None = None,
        keeps_places: bool = False,
    ) -> None:
        self.at = at
        self.again = again
        self._keeps_places = keeps_places
        self.broken: list[str] = []
        self.met: list[Place] = []
        self._folder = folder
        self._variant = variant
        self._died_in = -1
        self._lost = False
        self._victim = Victim(folder / VICTIM, variant)
        self._others = {
            name: HONEST.open(folder / name, name, Stub(name)) for name in NAMES if name != VICTIM
        }
        self._asked: list[bytes] = []
        self._answers: dict[tuple[Any, ...], set[bytes]] = defaultdict(set)
        self._survivors: dict[tuple[int, int], tuple[int, ...]] = {}
        self._revealed: dict[tuple[int, int, int], set[bytes]] = defaultdict(set)
        self._totals: list[NDArray[np.uint32]] = []
        self._uploads: set[tuple[int, int]] = set()
        self._reports: list[RoundReport] = []

    def run(self) -> None:
        """Train to the end, whatever happens to the victim, and hold what happened against the promises."""
        progress = State.open(self._folder / "server").progress(SIGNED_PLAN, PLAN)
        rounds = MaskedRounds(
            self, SIGNED_PLAN, PLAN, lambda: DIRECTORY, progress.next_attempt,
            setup_rounds=BLOCK, attempts=1, clock=lambda: NOW, watch=self._watch,
        )  # fmt: skip
        try:
            try:
                self._victim.start(Points((*WATCHED, *self._variant.source), self.at))
            except Died:
                self._after_death()
            train(
                rounds, progress, create({"name": "fedavg"}),
                np.zeros(PLAN.dimension, np.float32), tail_average=0.5, on_round=self._reports.append,
            )  # fmt: skip
        except HanseError as error:
            self.broken.append(f"the training did not end: {error}")
        self.met = self._victim.end()
        expected = 1 + (self.at is not None) + (self.again is not None)
        if self._victim.lives < expected:
            raise RuntimeError(f"the victim never came to {self.at}, {self.again}")
        self._check_budget()
        self._check_answers()
        self._check_files()
        self._check_sums()

    # The transport that the coordinator sees.

    def gather(self) -> tuple[str, ...]:
        return NAMES

    def merchants(self) -> tuple[str, ...]:
        return NAMES

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        for name, payload in sorted(payloads.items()):
            if name != VICTIM:
                yield name, self._others[name].handle(payload)
                continue
            if self._lost:
                continue
            self._asked.append(payload)
            round_ = self._decoded(payload).round
            try:
                answer = self._ask(payload)
            except Died:
                self._died_in = round_
                self._after_death()
                continue
            yield name, answer
            if (
                self.at == (type(self._decoded(payload)).__name__, 0, "", 0, "sent")
                and self._victim.lives == 1
            ):
                self._died_in = round_
                self._victim.await_death()
                self._after_death()

    # What the victim says is held against what it said before.

    def _ask(self, payload: bytes) -> bytes:
        question = self._decoded(payload)
        answer = self._victim.ask(payload)
        message = wire.decode_any(ANSWERS, answer, messages.MAX_MESSAGE_BYTES)
        if isinstance(question, Survivors) and isinstance(message, Agreed):
            self._survivors[question.round, question.attempt] = question.places
        if not isinstance(message, Declined):
            self._answers[type(message).__name__, message.round, message.attempt].add(answer)
        if isinstance(message, Upload):
            self._uploads.add((message.round, message.attempt))
            if (message.round, message.attempt) not in charged(self._victim.folder):
                self.broken.append(f"undercounted: round {message.round} left without a charge")
        if isinstance(message, Unmasked):
            self._note_revealed(message)
        return answer

    def _note_revealed(self, unmasked: Unmasked) -> None:
        """Note which secret of each member a share was revealed of, by the survivors that the victim signed."""
        survivors = self._survivors[unmasked.round, unmasked.attempt]
        for place in range(len(unmasked.openings) // OPENING_BYTES):
            kind = transcript.SEED if place in survivors else transcript.KEY
            self._revealed[unmasked.round, unmasked.attempt, place].add(kind)

    def _after_death(self) -> None:
        """Start the victim again on its files, and ask everything again, other survivors first."""
        try:
            if self.again is not None:
                with suppress(Died):
                    self._victim.start(Points(WATCHED, self.again))
                    raise RuntimeError(f"it never came to {self.again}")
            self._victim.start(Points(WATCHED if self._keeps_places else ()))
        except RuntimeError as error:
            self.broken.append(f"half-written: the merchant does not start again: {error}")
            self._lost = True
            return
        questions = [self._decoded(payload) for payload in self._asked]
        others = [
            one.model_copy(update={"places": one.places[1:]})
            for one in questions
            if isinstance(one, Survivors)
        ]
        for again in (*map(wire.encode, others), *reversed(self._asked), *self._asked):
            try:
                self._ask(again)
            except RuntimeError as error:
                self.broken.append(f"the merchant fails: {error}")
                return

    def _decoded(self, payload: bytes) -> Work:
        return wire.decode_any(QUESTIONS, payload, messages.MAX_MESSAGE_BYTES)

    def _watch(self, name: str, residues: NDArray[np.uint32]) -> None:
        if not name:
            self._totals.append(residues.copy())

    # What must hold when all is over.

    def _check_budget(self) -> None:
        rows = charged(self._victim.folder)
        if missing := self._uploads - set(rows):
            self.broken.append(f"undercounted: uploads without a charge in the end: {sorted(missing)}")
        touched = []
        if self._victim.touches.exists():
            touched = [json.loads(line) for line in self._victim.touches.read_text().splitlines()]
        for touch in touched:
            if not touch["charged"] or tuple(touch["work"]) not in rows:
                self.broken.append(f"undercounted: photos touched before the charge, {touch['work']}")
        works = [tuple(touch["work"]) for touch in touched]
        if len(set(works)) < len(works):
            self.broken.append(f"undercounted: photos touched twice for one charge: {works}")
        if len(rows) > len(works) + 1:
            self.broken.append(f"charged more than a crash can cost: {rows}, touched {works}")

    def _check_answers(self) -> None:
        for (kind, round_, attempt), answers in self._answers.items():
            if len(answers) > 1:
                self.broken.append(f"answered twice: {kind} of round {round_}, attempt {attempt}")
        for where, kinds in self._revealed.items():
            if len(kinds) > 1:
                self.broken.append(f"answered twice: both shares of {where} are out")

    def _check_files(self) -> None:
        folder = self._victim.folder
        try:
            Ledger(folder / "ledger.sqlite", BUDGET).verify()
            Markers(folder / "markers.sqlite").witnesses()
        except HanseError as error:
            self.broken.append(f"half-written: {error}")
        litter = {file.name for file in folder.iterdir()} - STATE
        born = self.at is not None and self.at[0] == "open"
        if litter and not (born and all(name.startswith(".ledger.sqlite.") for name in litter)):
            self.broken.append(f"half-written: found {sorted(litter)} beside ledger and marks")

    def _check_sums(self) -> None:
        rounds = [report.round for report in self._reports]
        if rounds != list(range(ROUNDS)):
            self.broken.append(f"the training has rounds {rounds}, expected {ROUNDS}")
            return
        for report, total in zip(self._reports, self._totals, strict=True):
            expected = np.zeros(PLAN.dimension, np.uint32)
            for name in report.outcome.uploaded:
                expected += update_of(name, report.round)
            if not np.array_equal(total, expected):
                self.broken.append(f"the sum of round {report.round} is not that of its survivors")
            if report.outcome.blamed:
                self.broken.append(f"an honest merchant is blamed: {report.outcome.blamed}")
        if self._reports[-1].outcome.uploaded != NAMES and self._died_in < BLOCK:
            self.broken.append(f"the last round had {self._reports[-1].outcome.uploaded} alone")


def trained(folder: Path, *arguments: Any, **options: Any) -> Training:
    """Return a `Training` of these arguments that is over, in a folder that is gone."""
    folder.mkdir()
    try:
        training = Training(folder, *arguments, **options)
        training.run()
        return training
    finally:
        shutil.rmtree(folder)
