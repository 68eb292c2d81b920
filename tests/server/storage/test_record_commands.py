"""The operator's commands over any database: status, publish, audit, backup, restore into another, migrate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import func, select

from hanse_common import signing, wire
from hanse_common.plan import Plan, SignedPlan
from hanse_server import cli
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.storage import Database, State
from hanse_server.storage.schema import Record

Type = Callable[..., tuple[int, str, str]]

PLAN: dict[str, Any] = {
    "league": "test",
    "taxonomy": {"classes": ["shirt", "shoe", "bag"]},
    "recipe": {
        "preprocessing": {"size": 8, "channels": 1},
        "backbone": {"name": "scattering", "scales": 1, "angles": 2, "groups": None},
    },
    "training": {
        "mode": "distributed",
        "rounds": 3,
        "sampling_rate": 0.5,
        "expected_batch": 100,
        "clipping_norm": 1,
    },
    "privacy": {"epsilon": 8},
    "cohort": {"min_merchants": 3, "max_merchants": 4},
}


@pytest.fixture
def typed(
    tmp_path: Path,
    keys: DevelopmentKeys,
    make_plan: Callable[..., Plan],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Type:
    """Return a function that runs a command with the storage and the state folder named first."""
    monkeypatch.chdir(tmp_path)
    signing.create_key(tmp_path / "operator.key")
    signed = SignedPlan.sign(make_plan(), signing.load_key(tmp_path / "operator.key"))
    (tmp_path / "plan.hanse").write_bytes(wire.encode(signed))

    def call(storage: str | None, state: str, *words: str) -> tuple[int, str, str]:
        config = {
            "signing_key": "operator.key",
            "plan": PLAN,
            "service": {
                "plan": "plan.hanse",
                "directory": str(keys.directory),
                "charter": keys.pinned,
                "state": state,
                "storage": storage,
                "tls": {name: str(getattr(keys, name)) for name in ("authority", "certificate", "key")},
                "admin": {"token": str(keys.token)},
                "aggregator": {"address": "localhost:9093"},
            },
        }
        (tmp_path / "hanse-server.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["hanse-server", *words])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_records_move_from_one_database_to_another_and_nothing_is_lost(
    url: str, make_url: Callable[[], str], typed: Type, fill: Callable[[State], Any], tmp_path: Path
) -> None:
    with State.open(tmp_path / "state", url) as state:
        fill(state)
        folder = tmp_path / "third"
        folder.mkdir()
        (folder / "card.json").write_text("3")
        (folder / "model.safetensors").write_bytes(b"3")
        plan = bytes.fromhex(state.versions.all()[0].plan)
        state.versions.add(folder, plan, None, bytes(32))
    assert typed(url, "state", "publish", "3", "--without-figures", "--reason", "best")[0] == 0
    code, out, _ = typed(url, "state", "audit", "--verify")
    assert code == 0
    head = out.rstrip().rpartition("noted down: ")[2]
    assert typed(url, "state", "backup", "one.tar")[0] == 0
    assert typed(url, "state", "backup", "one.tar")[0] != 0  # a file is there

    # To the default database, and on to a third.
    assert typed(None, "second", "restore", "one.tar")[:2] == (
        0,
        f"Restored {_count(url)} records.\nGo on with hanse-server resume.\n",
    )
    assert typed(None, "second", "audit", "--verify", "--head", head)[0] == 0
    assert typed(None, "second", "backup", "two.tar")[0] == 0
    third = make_url()
    assert typed(third, "third-state", "restore", "two.tar")[0] == 0
    assert typed(third, "third-state", "audit", "--verify", "--head", head)[0] == 0
    for storage, place in ((url, "state"), (None, "second"), (third, "third-state")):
        listed = typed(storage, place, "versions")[1]
        assert [line.split()[:2] for line in listed.splitlines()[1:]] == [
            ["3", "released"],
            ["2", "superseded"],
            ["1", "withdrawn"],
        ]
    code, _, err = typed(third, "third-state", "restore", "one.tar")
    assert code == 26
    assert "holds records already" in err
    assert typed(third, "third-state", "rollback", "2")[0] == 0
    assert typed(third, "third-state", "versions")[1].splitlines()[2].split()[:2] == ["2", "released"]


@pytest.mark.slow  # it loads torch
def test_a_restore_leaves_out_what_merchants_paid_for(
    typed: Type, fill: Callable[[State], Any], tmp_path: Path
) -> None:
    with State.open(tmp_path / "state") as state:
        fill(state)
    assert typed(None, "state", "backup", "one.tar")[0] == 0
    code, out, err = typed(None, "second", "restore", "one.tar", "--rounds", "3")
    assert (code, err) == (0, "")
    assert "The training goes on after round 3." in out
    code, _, err = typed(None, "third", "restore", "one.tar", "--evaluations", "1")
    assert code == 10
    assert "service.evaluation" in err


def test_a_schema_goes_back_and_forth_by_a_command(
    url: str, typed: Type, fill: Callable[[State], Any], tmp_path: Path
) -> None:
    with State.open(tmp_path / "state", url) as state:
        fill(state)
    assert typed(url, "state", "migrate", "--to", "0001")[1] == "Schema version 0001; it was 0002.\n"
    code, _, err = typed(url, "state", "status")
    assert code == 26
    assert "hanse-server migrate" in err
    assert typed(url, "state", "migrate")[1] == "Schema version 0002; it was 0001.\n"
    assert typed(url, "state", "audit", "--verify")[0] == 0


def _count(url: str) -> int:
    records = Database(url)
    with records.reading() as session:
        counts = [
            session.scalar(select(func.count()).select_from(table)) or 0
            for table in Record.metadata.sorted_tables
        ]
    records.close()
    return sum(counts)
