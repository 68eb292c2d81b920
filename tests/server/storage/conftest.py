"""The databases that these tests run over: SQLite always, a PostgreSQL of our own in the slow ones."""

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from hanse_common.messages import DeclineCode
from hanse_common.plan import Plan, SignedPlan
from hanse_common.release import Release, ReleasedFile, SignedRelease
from hanse_server.coordinator import RoundOutcome
from hanse_server.league import train
from hanse_server.optimizers import create
from hanse_server.storage import Progress, State

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PROGRAMS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """A function that makes an empty PostgreSQL database and returns its URL. The server is this session's own."""
    psycopg = pytest.importorskip("psycopg")
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="hanse-pg-"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # which PostgreSQL refuses to be
        as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        shutil.chown(folder, "nobody", "nogroup")

    def call(program: str, *arguments: str) -> None:
        words = [*as_user, str(programs / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(words, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

    call("initdb", "-A", "trust", "-U", "hanse", "-E", "UTF8", "--locale=C", "--no-sync")
    settings = f"-c listen_addresses= -c fsync=off -c max_connections=60 -k {folder}"
    call("pg_ctl", "-w", "-o", settings, "-l", str(folder / "log"), "start")
    numbers = itertools.count()

    def make() -> str:
        name = f"hanse{next(numbers)}"
        with psycopg.connect(f"host={folder} user=hanse dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://hanse@/{name}?host={folder}"

    yield make
    call("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder)


def _programs() -> Path:
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    for pattern in PROGRAMS:
        folders = sorted(Path("/").glob(pattern[1:]))
        if folders:
            return folders[-1]
    pytest.skip("PostgreSQL's server is not installed: apt install postgresql")


@pytest.fixture
def make_postgresql(request: pytest.FixtureRequest) -> Callable[[], str]:
    made: Callable[[], str] = request.getfixturevalue("postgresql")
    return made


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Return a function that returns the URL of a new, empty database."""
    if request.param == "postgresql":
        made: Callable[[], str] = request.getfixturevalue("postgresql")
        return made
    numbers = itertools.count()
    return lambda: f"sqlite:///{tmp_path / f'database-{next(numbers)}.sqlite'}"


@pytest.fixture
def url(make_url: Callable[[], str]) -> str:
    """The URL of a new, empty database."""
    return make_url()


@pytest.fixture
def state(url: str, tmp_path: Path) -> Iterator[State]:
    """An empty state."""
    with State.open(tmp_path / "state", url) as state:
        yield state


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], int]:
    """Return a function that runs another in a forked process and returns how that ended, as `os.waitpid` has it."""

    def call(work: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                os._exit(1)
        return os.waitpid(child, 0)[1]

    return call


@pytest.fixture
def progress_of(make_plan: Callable[..., Plan]) -> Callable[..., Progress]:
    """Return a function that returns a small plan's progress in a state; `changes` make it another plan."""

    def progress(state: State, **changes: Any) -> Progress:
        plan = make_plan(**changes)
        return state.progress(SignedPlan.sign(plan, KEY), plan)

    return progress


class Rounds:
    """Rounds that come to something, without merchants; each begins an attempt."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seen: list[int] = []

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        self._progress.next_attempt()
        self.seen.append(round_)
        return outcome(0.1 * (round_ + 1) - 0.5 * model.astype(np.float64))


def outcome(update: NDArray[np.float64]) -> RoundOutcome:
    return RoundOutcome(
        update,
        ("alder", "birch"),
        ("cedar",),
        {"damson": DeclineCode.BUDGET},
        {"elder": "its key is 0\0\ud800 and 雪"},
        norm=1.5,
    )


@pytest.fixture
def make_outcome() -> Callable[[NDArray[np.float64]], RoundOutcome]:
    """Return a function that makes a round's outcome with merchants in each role."""
    return outcome


@pytest.fixture
def make_rounds() -> Callable[[Progress], Any]:
    """Return a function that makes rounds without merchants."""
    return Rounds


@pytest.fixture
def train_all(make_rounds: Callable[[Progress], Any]) -> Callable[..., NDArray[np.float32]]:
    """Return a function that trains a plan to its end, or up to an exception from `on_round`."""

    def go(progress: Progress, rounds: Any = None, **more: Any) -> NDArray[np.float32]:
        return train(
            make_rounds(progress) if rounds is None else rounds,
            progress,
            create({"name": "fedadam"}),
            np.ones(progress.plan.dimension, dtype=np.float32),
            tail_average=0.5,
            **more,
        )

    return go


@pytest.fixture
def fill(
    progress_of: Callable[..., Progress], tmp_path: Path, make_outcome: Callable[..., RoundOutcome]
) -> Callable[[State], Progress]:
    """Return a function that writes records of all kinds, through the functions that the server uses."""

    def everything(state: State) -> Progress:
        from hanse_common.charter import founded
        from hanse_common.directory import Directory, Entry

        progress = progress_of(state)
        history, versions = state.history, state.versions
        history.see_directory(
            Directory(
                league="test",
                charter=founded("test", KEY).read().digest,
                version=1,
                expires=1 << 39,
                entries=(Entry(name="alder", entity="alder", identity=bytes(range(32)), expires=1 << 39),),
            )
        )
        for number, ending in enumerate(("failed", "finished")):
            run = history.begin_run(progress.plan.digest, number)
            history.open_block(
                run, progress.plan.digest, bytes([number]) * 16, {"order": ["alder"], "seed": "雪"}
            )
            history.move_block(bytes([number]) * 16, "open", ["alder", "birch"])
            history.move_block(bytes([number]) * 16, "closed")
            history.end_run(run, ending, "no room \U0001f600" * 500)
        progress.start_from(lambda: _beginning(progress.plan))
        progress.next_attempt()
        progress.next_attempt()
        progress.release(0, make_outcome(np.arange(progress.plan.dimension) / 7), 2.5)
        progress.apply(_checkpoint(progress.plan, 1))
        progress.next_attempt()
        progress.release(1, make_outcome(np.ones(progress.plan.dimension)))
        history.spent("alder", 0.1 + 0.2)
        tried = progress_of(state, serial=b"e" * 16)
        tried.next_attempt()
        subject = {"training": progress.plan.digest.hex(), "after": 1, "model": "ab" * 32}
        tried.release(0, make_outcome(np.zeros(3)), subject=subject)
        tried.evaluated(0, '{"photos": 3}')
        tried.leave_out(2)
        for number in (1, 2):
            folder = tmp_path / f"recognizer-{id(state)}-{number}"
            folder.mkdir()
            (folder / "card.json").write_text(f'{{"number": {number}}}')
            (folder / "model.safetensors").write_bytes(bytes([number]) * 100)
            made = versions.add(folder, progress.plan.digest, None, bytes([number]) * 32)
            versions.release(made.digest, signed_release(made, number), number, "better", back=number == 2)
        return progress

    return everything


def signed_release(version: Any, number: int) -> SignedRelease:
    release = Release(
        league="test",
        number=number,
        version=version.number,
        recognizer=bytes.fromhex(version.digest),
        files=tuple(
            ReleasedFile(name=name, digest=bytes.fromhex(digest), size=1)
            for name, digest in sorted(version.files.items())
        ),
        made=1,
    )
    return SignedRelease.sign(release, KEY)


@pytest.fixture
def sign_release_of() -> Callable[[Any, int], SignedRelease]:
    """Return a function that signs the statement that a version is released."""
    return signed_release


def _beginning(plan: Plan) -> Any:
    from hanse_server.storage import Beginning

    return Beginning(np.zeros(plan.dimension, dtype=np.float32), b'{"card": 1}')


def _checkpoint(plan: Plan, rounds_done: int) -> Any:
    from hanse_server.storage import Checkpoint

    zeros = np.zeros(plan.dimension)
    return Checkpoint(rounds_done, zeros + rounds_done, {"m": zeros}, zeros, 0)
