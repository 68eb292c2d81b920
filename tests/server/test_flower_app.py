"""Flower's app bundle: what it carries, and what `flwr run` can make our server do with any bundle at all."""

import importlib
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hanse_common import wire
from hanse_common.flower import from_record, to_record
from hanse_common.session import BlockReport, ReportCode
from hanse_server.flower_executor import Executor, RunContext
from hanse_server.flower_link import SuperLink

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import Status, SubStatus
from flwr.supercore.task_identity import TaskIdentity

pytestmark = pytest.mark.usefixtures("quick_executor")

WAIT = 60.0
Flwr = Callable[..., "subprocess.CompletedProcess[str]"]

HOSTILE_PYPROJECT = """
[project]
name = "hostile"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "stranger"

[tool.flwr.app.components]
serverapp = "hostile.server:app"
clientapp = "hostile.client:app"

[tool.flwr.app.config]
rounds = 1000000
"""

HOSTILE_MODULE = """
from pathlib import Path
Path({sentinel!r}).write_text("imported")
from flwr.{kind}app import {Kind}App
app = {Kind}App()

@app.{method}()
def main(*arguments):
    Path({sentinel!r}).write_text("called")
"""


@pytest.fixture
def shims(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The two modules, imported as Flower would out of an unpacked bundle."""
    monkeypatch.syspath_prepend(str(root))
    return importlib.import_module("server.flower_server"), importlib.import_module("client.flower_client")


@pytest.fixture
def ended(link: SuperLink, wait_until: Callable[..., Any]) -> Callable[[int], tuple[str, str]]:
    """Return a function that waits for a run's end and returns how it ended."""

    def wait(run: int) -> tuple[str, str]:
        wait_until("the run's end", lambda: link.state.get_run_status({run})[run].status == Status.FINISHED)
        status = link.state.get_run_status({run})[run]
        return status.sub_status, status.details

    return wait


def started(result: "subprocess.CompletedProcess[str]") -> int:
    """Return the number of the run that `flwr run` says it began."""
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"Successfully started run (\d+)", result.stdout)
    assert found is not None, result.stdout
    return int(found[1])


def test_the_bundle_carries_configuration_and_two_apps_that_do_nothing(
    root: Path, flwr: Flwr, tmp_path: Path
) -> None:
    # `flwr build` wants a folder with a name for a project, and writes where it is called.
    built = flwr(tmp_path / "home", "build", "--app", str(root), cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (bundle,) = tmp_path.glob("hanse.hanse.*.fab")
    with zipfile.ZipFile(bundle) as archive:
        assert set(archive.namelist()) == {
            "pyproject.toml",
            "server/flower_server.py",
            "client/flower_client.py",
            ".info/CONTENT",
        }
    assert bundle.stat().st_size < 20_000


def test_the_server_shim_says_who_runs_a_league(shims: tuple[ModuleType, ModuleType]) -> None:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(RuntimeError, match="hanse-server run"):
        shims[0].app(grid=object(), context=context)


def test_the_client_shim_declines_with_a_code(shims: tuple[ModuleType, ModuleType]) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    message = Message(to_record(b"anything"), 2, "train")
    message.metadata.__dict__["_message_id"] = "1"
    reply = shims[1].app(message, context)
    report = wire.decode(BlockReport, from_record(reply.content, 1000))
    assert (report.block, report.code) == (bytes(16), ReportCode.UNAVAILABLE)


def test_flwr_run_begins_a_league_run_that_ls_log_and_stop_know(
    link: SuperLink, flwr: Flwr, ended: Callable[[int], Any]
) -> None:
    stopped: list[bool] = []

    def run(context: RunContext) -> None:
        context.log("Round 1 of 4: 5 merchants.")
        stopped.append(context.stopped.wait(WAIT))

    with Executor(link.state, run):
        # What the operator types, in the repository's folder: FLWR_HOME=… flwr run .
        number = started(flwr(link.flwr_home, "run", "."))
        own = link.start_run()
        listed = flwr(link.flwr_home, "ls", "--format", "json").stdout
        assert f'"run-id": "{number}"' in listed
        assert f'"run-id": "{own}"' in listed
        assert '"status": "running"' in listed
        stop = flwr(link.flwr_home, "stop", str(number))
        assert stop.returncode == 0, stop.stderr
        assert ended(number) == (SubStatus.STOPPED, "")
        assert "Round 1 of 4: 5 merchants." in flwr(link.flwr_home, "log", str(number)).stdout
        link.stop_run(own)
        ended(own)
    assert stopped[0] is True


def test_nothing_of_a_hostile_bundle_is_executed(
    link: SuperLink, flwr: Flwr, tmp_path: Path, ended: Callable[[int], Any]
) -> None:
    sentinel, app = tmp_path / "sentinel", tmp_path / "hostile-app"
    (app / "hostile").mkdir(parents=True)
    (app / "pyproject.toml").write_text(HOSTILE_PYPROJECT)
    for kind, method in (("server", "main"), ("client", "train")):
        text = HOSTILE_MODULE.format(sentinel=str(sentinel), kind=kind, Kind=kind.title(), method=method)
        (app / "hostile" / f"{kind}.py").write_text(text)
    executed: list[int] = []
    before = files(link.flwr_home, Path.cwd() / "apps")
    with Executor(link.state, lambda context: executed.append(context.run_id)):
        number = started(flwr(link.flwr_home, "run", str(app)))
        assert ended(number) == (SubStatus.COMPLETED, "")
    assert executed == [number]
    assert not sentinel.exists()
    assert files(link.flwr_home, Path.cwd() / "apps") == before, "the bundle was unpacked"


def files(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def test_the_hostile_bundle_would_leave_a_mark(tmp_path: Path) -> None:
    """Its modules do what the test above watches for: else that test would show nothing."""
    sentinel = tmp_path / "sentinel"
    for kind, method in (("server", "main"), ("client", "train")):
        text = HOSTILE_MODULE.format(sentinel=str(sentinel), kind=kind, Kind=kind.title(), method=method)
        exec(text, {})  # noqa: S102
        assert sentinel.read_text() == "imported"
        sentinel.unlink()
