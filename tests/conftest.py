"""What several test files need: a small plan, public data, a browser, and a SuperLink on loopback."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

# Tests run side by side, one process a core; torch's threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hanse_common.modes import LocalTraining
from hanse_common.plan import Cohort, Plan
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.config import Admin, AggregatorListener, Fleet, Service, Tls
from hanse_server.development_keys import DevelopmentKeys, make_keys

if TYPE_CHECKING:  # flwr takes seconds to load, which most tests need not wait for
    from hanse_server.flower_executor import RunContext
    from hanse_server.flower_link import SuperLink

ROOT = Path(__file__).parent.parent

WAIT = 60.0
"""Bound of every wait in these tests, in seconds. None comes near it unless something is broken."""

CHROMIUM = Path("/usr/bin/chromium")

MERCHANTS = ("alder", "birch", "cedar")

TRAINING: dict[str, Any] = {
    "rounds": 4,
    "local_steps": 2,
    "sampling_rate": 0.2,
    "expected_batch": 20.0,
    "clipping_norm": 1.0,
    "learning_rate": 5.0,
    "update_bound": 8.0,
    "noise_multiplier": 2.0,
}

# No test is right or wrong by how long it takes: machines are busy.
settings.register_profile("hanse", deadline=None)
settings.load_profile("hanse")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def missing_data(folder: Path) -> str:
    """Say what to do where a file of Fashion-MNIST is not in `folder`; return nothing where all are there."""
    names = (
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )
    lacking = [name for name in names if not (folder / name).is_file()]
    if not lacking:
        return ""
    return f"{folder}: found no {', '.join(lacking)}; run `make install`, which fetches Fashion-MNIST, once."


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Where `make install` puts Fashion-MNIST."""
    folder = ROOT / ".data" / "fashion-mnist"
    if missing := missing_data(folder):
        pytest.fail(missing, pytrace=False)
    return folder


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """Return a function that makes a small valid plan, changed by keyword."""

    def make(training: dict[str, Any] | None = None, **changes: Any) -> Plan:
        recipe = Recipe(
            preprocessing=Preprocessing(size=8, channels=1),
            backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=6)),
            model=Linear(),
        )
        taxonomy = Taxonomy(classes=("shirt", "shoe", "bag"))
        fields: dict[str, Any] = {
            "league": "test",
            "serial": bytes(16),
            "recipe": recipe,
            "taxonomy": taxonomy,
            "dimension": recipe.dimension(3),
            "training": LocalTraining(**(TRAINING | (training or {}))),
            "cohort": Cohort(min_merchants=3, max_merchants=5, upload_slot=0),
            "delta": 1e-5,
        }
        return Plan(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def wait_until() -> Callable[[str, Callable[[], Any]], Any]:
    """A function that returns what its condition gives as soon as that is true, and fails after `WAIT`."""

    def until(what: str, condition: Callable[[], Any]) -> Any:
        given_up = time.monotonic() + WAIT
        while time.monotonic() < given_up:
            if found := condition():
                return found
            time.sleep(0.02)
        raise AssertionError(f"waited {WAIT} s for {what}")

    return until


@pytest.fixture
def folder_in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a killed process leaves does not depend on the disk."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentKeys:
    """Authority, certificate, token and three merchants' keys."""
    return make_keys(tmp_path_factory.mktemp("league") / "keys", ("localhost", "127.0.0.1"), MERCHANTS)


@pytest.fixture
def make_service(keys: DevelopmentKeys, tmp_path: Path) -> Callable[..., Service]:
    """Return a function that makes the section `service`, on free ports, changed by keyword."""

    def make(**changes: Any) -> Service:
        fields: dict[str, Any] = {
            "plan": tmp_path / "plan",
            "directory": keys.directory,
            "charter": keys.pinned,
            "state": tmp_path / "state",
            "tls": Tls(authority=keys.authority, certificate=keys.certificate, key=keys.key),
            "admin": Admin(port=0, token=keys.token),
            "fleet": Fleet(host="127.0.0.1", port=0),
            "aggregator": AggregatorListener(address="localhost:1"),
            "page": None,
        }
        return Service(**(fields | changes))

    return make


@pytest.fixture
def link(make_service: Callable[..., Service]) -> Iterator["SuperLink"]:
    """A SuperLink that listens, and knows no node."""
    from hanse_server.flower_link import SuperLink

    with SuperLink(make_service()) as link:
        yield link
        for listener in (link._admin, link._fleet):  # both at once: each looks ten times a second
            listener._server.should_exit = True


@pytest.fixture
def quick_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an executor look for runs and their ends without much delay."""
    from hanse_server import flower_executor

    monkeypatch.setattr(flower_executor, "POLL_SECONDS", 0.02)


@pytest.fixture
def running(
    link: "SuperLink", quick_executor: None, wait_until: Callable[..., Any]
) -> Iterator["RunContext"]:
    """The context of a Flower run that goes on until the test ends."""
    from hanse_server.flower_executor import Executor, RunContext

    contexts: list[RunContext] = []
    over = threading.Event()

    def run(context: RunContext) -> None:
        contexts.append(context)
        over.wait(WAIT)

    with Executor(link.state, run, over.set):
        link.start_run()
        yield wait_until("the run to begin", lambda: contexts)[0]
