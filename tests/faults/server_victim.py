"""The server's side in a process of its own, which dies where it is told to, and lives again on the same state.

It is the real `Work` over the real blocks, coordinator and records. In place of Flower and of merchants' streams there
is a pipe: each question goes out on it, for one merchant, and the answer comes back.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from points import Place, Points
from server_setting import (
    EVALUATION,
    MEMBERS,
    PLAN,
    SIGNED_EVALUATION,
    SIGNED_PLAN,
    ServerVariant,
    config_of,
)
from setting import NAMES

from hanse_common import files
from hanse_common.secagg import aggregator
from hanse_common.session import Assignment, ReportCode
from hanse_common.vision import recognizer
from hanse_server import blocks, coordinator, evaluations, league, records, roll, training, work
from hanse_server.live import Live
from hanse_server.metrics import Metrics
from hanse_server.reporting import Event, Reporter
from hanse_server.storage import audit_log, database, history, objects, progress, state, versions

WATCHED = tuple(
    Path(module.__file__)
    for module in (
        progress, objects, history, versions, state, database, audit_log, files,
        league, evaluations, training, work, records, coordinator, roll, blocks, aggregator, recognizer,
    )
)  # fmt: skip

ASK = b"?"
DONE, FAILED = b"=", b"!"


class Died(Exception):
    """The server is gone."""


class Streams:
    """Merchants' streams and Flower's membership, as `hanse_server.blocks` sees them, over one pipe."""

    def __init__(self, pipe: Connection, points: Points) -> None:
        self._pipe = pipe
        self._points = points
        self._there: frozenset[str] = frozenset()
        self._reports: dict[str, ReportCode] = {}

    def online(self) -> frozenset[str]:
        return frozenset(NAMES)

    def assign(self, assignment: Assignment, names: frozenset[str]) -> None:
        self._there |= names

    def reports(self) -> Mapping[str, ReportCode]:
        return self._reports

    def open_block(self, block: bytes, max_record_bytes: int) -> None:
        self._reports = {}

    def close_block(self) -> None:
        self._reports = dict.fromkeys(self._there, ReportCode.DONE)
        self._there = frozenset()

    def connected(self) -> tuple[str, ...]:
        return tuple(sorted(self._there))

    def wait(self, seconds: float, until: Callable[[frozenset[str]], bool]) -> bool:
        return until(self._there)

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        for name, payload in sorted(payloads.items()):
            self._pipe.send_bytes(ASK + name.encode() + b"\0" + payload)
            answer = self._pipe.recv_bytes()
            self._points.arrive(f"{kind} of {name}")
            yield name, answer


def serve(folder: Path, pipe: Connection, points: Points, variant: ServerVariant) -> None:
    """Do what `hanse-server run` or `resume` does, but for its listeners and Flower's own state."""
    streams = Streams(pipe, points)
    names = frozenset(NAMES)
    members: Any = SimpleNamespace(
        current=MEMBERS,
        nodes={},
        names=names,
        identities={identity: name for name, identity in MEMBERS.identities.items()},
        refresh=lambda tell: None,
    )
    work.FlowerMembership = lambda *arguments: streams  # type: ignore[assignment, misc]
    config, service = config_of(folder)

    def tell(event: Event) -> None:
        if event.kind == "round":
            points.move(f"after round {event.facts['round']}")
        elif event.kind == "evaluated":
            points.move(f"tried after round {event.facts['after']}")

    with points.watched("open"), variant.state(folder) as kept, kept.alone():
        kept.collect()
        made = variant.training(
            config, service, kept, kept.progress(SIGNED_PLAN, PLAN), kept.progress(SIGNED_EVALUATION, EVALUATION)
        )  # fmt: skip
        reporter = Reporter(tell, kept, Metrics(folder), Live())
        worked = work.Work(made, members, streams, SimpleNamespace(), reporter)  # type: ignore[arg-type]
        done = made.progress.rounds_done()
        run = kept.history.begin_run(PLAN.digest, done)
        points.move(f"after round {done}")
        context: Any = SimpleNamespace(grid=None, log=lambda text: None)
        worked.run(context, run, done)
        kept.history.end_run(run, *reporter.ended(None))


class Server:
    """The server in a child process. Each `start` is another life on the same state."""

    def __init__(self, folder: Path, variant: ServerVariant, answer: Callable[[str, bytes], bytes]) -> None:
        self._folder = folder
        self._variant = variant
        self._answer = answer
        self.lives = 0

    def live(self, points: Points) -> list[Place]:
        """Live once, and return the places met. Raises `Died` when killed, `RuntimeError` when it fails."""
        ours, theirs = multiprocessing.Pipe()
        self.lives += 1
        pid = os.fork()
        if pid == 0:
            ours.close()
            try:
                serve(self._folder, theirs, points, self._variant)
                theirs.send_bytes(DONE + json.dumps(list(points.seen)).encode())
            except BaseException as error:  # nothing of the parent's may run in here
                with suppress(OSError):
                    theirs.send_bytes(FAILED + f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        theirs.close()
        try:
            return self._attend(ours)
        except (EOFError, OSError):
            raise Died from None
        finally:
            ours.close()
            _, status = os.waitpid(pid, 0)
            if not (status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)):
                raise RuntimeError(f"the server ended with status {status}")

    def _attend(self, pipe: Connection) -> list[Place]:
        """Answer for the merchants until the server is done."""
        while True:
            said = pipe.recv_bytes()
            if said.startswith(ASK):
                name, _, payload = said[1:].partition(b"\0")
                pipe.send_bytes(self._answer(name.decode(), payload))
            elif said.startswith(DONE):
                return [tuple(place) for place in json.loads(said[1:])]
            else:
                raise RuntimeError(said[1:].decode())
