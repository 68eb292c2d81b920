"""A merchant in a process of its own, which dies where it is told to, and lives again on the same files."""

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from points import Place, Points
from setting import VICTIM, Stub, Variant, charged

from hanse_client import charges, ledger, markers, participant
from hanse_common import files, messages, wire
from hanse_common.messages import Invitation, Start
from hanse_common.secagg import faults, masking, merchant, ring, shamir, suite, transcript, witness
from hanse_common.secagg.messages import Agreement, Delivery, Roster, Survivors

QUESTIONS = (Invitation, Roster, Delivery, Start, Survivors, Agreement)

WATCHED = tuple(
    Path(module.__file__)
    for module in (
        participant, ledger, markers, charges, files,
        merchant, transcript, suite, shamir, witness, masking, ring, faults,
    )
)  # fmt: skip


class Died(Exception):
    """The victim is gone."""


class Victim:
    """A merchant in a child process. Each `start` is another life on the same files."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        self.folder = folder
        self.touches = folder.parent / "touches.jsonl"
        self.lives = 0
        self._variant = variant
        self._pid = 0
        self._pipe: Connection | None = None

    def start(self, points: Points) -> None:
        """Begin another life. Raises `Died` when it ends before it is ready."""
        ours, theirs = multiprocessing.Pipe()
        self.lives += 1
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            try:
                self._live(theirs, points)
            except BaseException as error:  # nothing of the parent's may run in here
                theirs.send_bytes(f"!{type(error).__name__}: {error}".encode())
            os._exit(0)
        theirs.close()
        self._pipe = ours
        ready = self._hear()
        if ready != b"ready":
            self._bury()
            raise RuntimeError(ready.decode())

    def ask(self, request: bytes) -> bytes:
        """Return the answer. Raises `Died`, and then it has left."""
        if self._pipe is None:
            raise Died
        try:
            self._pipe.send_bytes(request)
        except OSError:
            self._bury()
            raise Died from None
        answer = self._hear()
        if answer.startswith(b"!"):
            raise RuntimeError(answer.decode())
        return answer

    def end(self) -> list[Place]:
        """End this life in order and return the places it met."""
        if self._pipe is None:
            return []
        self._pipe.send_bytes(b"")
        found = [tuple(place) for place in json.loads(self._hear())]
        self._bury()
        return found  # type: ignore[return-value]

    def await_death(self) -> None:
        """Wait until it is gone: it was told to die once its answer is out."""
        self._bury()

    def _hear(self) -> bytes:
        try:
            return self._pipe.recv_bytes()  # type: ignore[union-attr]
        except (EOFError, OSError):
            self._bury()
            raise Died from None

    def _bury(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
            _, status = os.waitpid(self._pid, 0)
            if not (status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)):
                raise RuntimeError(f"the victim ended with status {status}")

    def _live(self, pipe: Connection, points: Points) -> None:
        """Answer until there is nothing more to answer."""
        work = (-1, -1)

        def touch(round_: int) -> None:
            line = {
                "work": work,
                "round": round_,
                "charged": list(work) in [list(c) for c in charged(self.folder)],
            }
            handle = os.open(self.touches, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, json.dumps(line).encode() + b"\n")
            os.fsync(handle)
            os.close(handle)

        with points.watched("open"):
            shop = self._variant.open(self.folder, VICTIM, Stub(VICTIM, touch))
        pipe.send_bytes(b"ready")
        while request := pipe.recv_bytes():
            message = wire.decode_any(QUESTIONS, request, messages.MAX_MESSAGE_BYTES)
            work = (message.round, message.attempt)
            with points.watched(type(message).__name__):
                answer = shop.handle(request)
            points.arrive("answered")
            pipe.send_bytes(answer)
            points.arrive("sent")
        pipe.send_bytes(json.dumps(list(points.seen)).encode())
