"""From a finished training to a released recognizer and back: the operator's commands over a real state."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.errors import RoundFailed
from hanse_common.plan import SignedPlan
from hanse_common.release import SignedRelease
from hanse_common.vision.recognizer import Recognizer
from hanse_server import cli
from hanse_server.config import ServerConfig, make_plan
from hanse_server.coordinator import RoundOutcome
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.storage import State
from hanse_server.training import Training

Type = Callable[..., tuple[int, str, str]]

PLAN: dict[str, Any] = {
    "league": "demo",
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


class Rounds:
    """Rounds that come to something, without merchants; from the round `fails` on they do not."""

    def __init__(self, seed: int, fails: int = 1000) -> None:
        self._rng = np.random.default_rng(seed)
        self._fails = fails

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        if round_ >= self._fails:
            raise RoundFailed("nobody came", "merchants")
        update = self._rng.normal(size=model.shape)
        return RoundOutcome(update, ("alder", "birch"), ("cedar",), {}, {}, norm=1.5, bound=4.0)


@pytest.fixture
def folder(tmp_path: Path, keys: DevelopmentKeys) -> Path:
    config = {
        "signing_key": "operator.key",
        "plan": PLAN,
        "service": {
            "plan": "plan.hanse",
            "directory": str(keys.directory),
            "charter": keys.pinned,
            "state": "state",
            "tls": {name: str(getattr(keys, name)) for name in ("authority", "certificate", "key")},
            "admin": {"token": str(keys.token)},
            "aggregator": {"address": "localhost:9093"},
        },
    }
    (tmp_path / "hanse-server.yaml").write_text(yaml.safe_dump(config))
    signing.create_key(tmp_path / "operator.key")
    return tmp_path


@pytest.fixture
def typed(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Type:
    monkeypatch.chdir(folder)

    def call(*words: str) -> tuple[int, str, str]:
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


def trained(folder: Path, seed: int, fails: int = 1000, **changes: Any) -> None:
    """Sign a plan of its own and train it; what it comes to is a candidate."""
    text = yaml.safe_load((folder / "hanse-server.yaml").read_text()) | changes
    (folder / "hanse-server.yaml").write_text(yaml.safe_dump(text))
    config = load(ServerConfig, folder / "hanse-server.yaml")
    key = signing.load_key(config.signing_key)
    plan = make_plan(config.plan, bytes([seed]) * 16)
    (folder / "plan.hanse").write_bytes(wire.encode(SignedPlan.sign(plan, key)))
    assert config.service is not None
    training = Training.open(config, config.service)
    run = training.state.history.begin_run(training.plan.digest, 0)
    try:
        model = training.run(Rounds(seed, fails), lambda report: None)
        training.publish(model, {"accuracy": 0.9})
        training.state.history.end_run(run, "finished")
    except RoundFailed as error:
        training.state.history.end_run(run, "failed", str(error))
    training.state.database.close()


def test_a_recognizer_is_released_superseded_and_taken_back(folder: Path, typed: Type) -> None:
    assert "None yet" in typed("versions")[1]
    for seed in (1, 2):
        trained(folder, seed)
        code, out, err = typed("publish", "--reason", "better shoes")
        assert (code, err) == (0, "")
        assert f"Version {seed} is released" in out
    operator = signing.load_public(folder / "operator.key.pub")
    first = wire.decode(SignedRelease, (folder / "state" / "release.hanse").read_bytes()).open(operator)
    assert (first.number, first.version, first.reason) == (2, 2, "better shoes")
    code, _, _ = typed("rollback", "1", "--reason", "worse after all")
    assert code == 0
    second = wire.decode(SignedRelease, (folder / "state" / "release.hanse").read_bytes()).open(operator)
    assert (second.number, second.version) == (3, 1)
    second.require_successor_of(first.number)
    with State.open(folder / "state") as state:
        assert {one.number: one.state for one in state.versions.all()} == {1: "released", 2: "withdrawn"}
    # What was withdrawn does not come back, and what is released is not released again.
    code, _, err = typed("publish", "2")
    assert code == 27
    assert "it is withdrawn" in err
    assert typed("publish", "1")[0] == 27
    assert typed("rollback", "1")[0] == 27


def test_an_exported_version_is_the_recognizer_that_was_trained(folder: Path, typed: Type) -> None:
    trained(folder, 1)
    assert typed("export", "out")[0] == 10  # none is released
    assert typed("export", "out", "1")[0] == 0
    made, kept = Recognizer.load(folder / "out"), Recognizer.load(folder / "state" / "recognizer")
    assert made.digest() == kept.digest()
    assert np.array_equal(made.vector, kept.vector)
    code, _, err = typed("export", "out", "1")
    assert code == 10
    assert "name a new folder" in err


def test_a_training_goes_on_from_a_version_and_carries_its_epsilon_and_lineage(
    folder: Path, typed: Type
) -> None:
    trained(folder, 1)
    classes = {"classes": ["bag", "trainer", "shirt", "hat"]}
    trained(
        folder,
        2,
        plan=PLAN | {"taxonomy": classes},
        start={"version": "1", "renamed": {"shoe": "trainer"}},
    )
    assert typed("export", "first", "1")[0] == typed("export", "second", "2")[0] == 0
    parent, child = Recognizer.load(folder / "first").card, Recognizer.load(folder / "second").card
    assert child.parent_digest == parent.digest().hex()
    assert [ancestor.digest for ancestor in child.lineage] == [child.parent_digest]
    assert parent.epsilon is not None
    assert child.epsilon is not None
    assert child.epsilon == pytest.approx(2 * parent.epsilon)
    lines = [line for line in typed("versions")[1].splitlines() if line.strip()]
    assert lines[1].split()[:2] == ["2", "candidate"]
    assert lines[1].split()[5] == "1"  # after


def test_figures_below_the_minimum_are_not_released(folder: Path, typed: Type) -> None:
    trained(folder, 1, publication={"minimum": 0.8})
    code, _, err = typed("publish")
    assert code == 27
    assert "no figures" in err
    assert typed("publish", "--without-figures")[0] == 0


def test_the_audit_log_is_sound_until_somebody_touches_it(folder: Path, typed: Type) -> None:
    trained(folder, 1)
    assert typed("publish")[0] == 0
    code, out, _ = typed("audit")
    assert code == 0
    for kind in ("plan", "run-begun", "sum-opened", "sum-applied", "version", "release"):
        assert kind in out
    head = out.rstrip().rpartition("noted down: ")[2]
    code, out, _ = typed("audit", "--verify", "--head", head)
    assert code == 0
    assert "are sound" in out
    with State.open(folder / "state") as state, state.database.transaction() as session:
        session.connection().exec_driver_sql(
            "UPDATE audit SET facts = replace(facts, '\"round\":1', '\"round\":2') WHERE kind = 'sum-opened'"
        )
    code, _, err = typed("audit", "--verify")
    assert code == 26
    assert "changed since it was written" in err


def test_status_says_what_an_operator_asks_first(folder: Path, typed: Type) -> None:
    assert "none was begun" in typed("status")[1]
    assert "Nothing is being trained" in typed("stop")[1]
    trained(folder, 1)
    _, out, _ = typed("status")
    for words in ("finished", "3 of 3", "2 uploaded, 1 dropped", "none yet", "candidates"):
        assert words in out
    found = json.loads(typed("status", "--json")[1])
    assert (found["rounds"], found["rounds_done"], found["run"]["state"]) == (3, 3, "finished")
    assert found["last_round"] == {"alder": "uploaded", "birch": "uploaded", "cedar": "dropped"}


def test_a_backup_comes_back_under_another_database_and_goes_on(folder: Path, typed: Type) -> None:
    trained(folder, 1)
    assert typed("publish")[0] == 0
    assert typed("backup", "all.tar")[0] == 0
    assert typed("backup", "all.tar")[0] == 10  # it is not overwritten
    code, _, err = typed("restore", "all.tar")
    assert code == 26
    assert "holds records already" in err
    before = typed("versions")[1]
    text = yaml.safe_load((folder / "hanse-server.yaml").read_text())
    text["service"] |= {"state": "other", "storage": f"sqlite:///{folder}/elsewhere.sqlite"}
    (folder / "hanse-server.yaml").write_text(yaml.safe_dump(text))
    assert typed("restore", "all.tar")[0] == 0
    assert typed("versions")[1] == before
    assert typed("export", "out")[0] == 0
    assert typed("audit", "--verify")[0] == 0
    damaged = (folder / "all.tar").read_bytes().replace(b'"league": "demo"', b'"leag_e": "shoes"')
    (folder / "damaged.tar").write_bytes(damaged)
    text["service"] |= {"state": "third", "storage": f"sqlite:///{folder}/third.sqlite"}
    (folder / "hanse-server.yaml").write_text(yaml.safe_dump(text))
    assert typed("restore", "damaged.tar")[0] == 26
    assert "None yet" in typed("versions")[1]


def test_a_training_that_cannot_go_on_is_not_lost(folder: Path, typed: Type) -> None:
    trained(folder, 1, fails=0)
    code, _, err = typed("finish")
    assert code == 10
    assert "no round of this plan is done" in err
    trained(folder, 2, fails=2)
    code, out, _ = typed("finish")
    assert code == 0
    assert "2 of 3 rounds" in out
    assert typed("publish", "--without-figures")[0] == 0
    assert "finished" in typed("audit")[1]
    code, _, err = typed("resume")
    assert code == 10
    assert "has ended with a version already" in err


def test_releases_after_a_restored_backup_do_not_repeat_numbers(folder: Path, typed: Type) -> None:
    trained(folder, 1)
    assert typed("backup", "before.tar")[0] == 0
    assert typed("publish")[0] == 0
    text = yaml.safe_load((folder / "hanse-server.yaml").read_text())
    text["service"] |= {"state": "other"}
    (folder / "hanse-server.yaml").write_text(yaml.safe_dump(text))
    assert typed("restore", "before.tar")[0] == 0
    numbers = []
    for _ in range(2):
        trained(folder, 2 + len(numbers))
        assert typed("publish")[0] == 0
        signed = wire.decode(SignedRelease, (folder / "other" / "release.hanse").read_bytes())
        numbers.append(signed.open(signing.load_public(folder / "operator.key.pub")).number)
    assert numbers == [1001, 1002]


def test_trends_are_counted_by_a_run_and_shown(folder: Path, typed: Type) -> None:
    """Two weeks in one state, each of its own plan, as an operator signs them one after the other."""
    file = folder / "hanse-server.yaml"
    config = yaml.safe_load(file.read_text())
    assert "Nothing was counted yet" in typed("trends")[1]
    for first_day, counts in (("2026-11-02", [900.0, 400.0, 3.0]), ("2026-11-09", [1800.0, 4100.0, -2.0])):
        config["plan"]["training"] = {
            "mode": "trends", "first_day": first_day, "days": 7, "expected_batch": 2000,
        }  # fmt: skip
        config["plan"]["privacy"] = {"epsilon": 1, "delta": 1e-6}
        # What moves a model moves no count.
        config["optimization"] = {"optimizer": {"name": "fedavgm", "learning_rate": 100, "momentum": 0.9}}
        config["service"]["plan"] = f"{first_day}.hanse"
        file.write_text(yaml.safe_dump(config))
        assert typed("sign", "--out", str(folder / f"{first_day}.hanse"))[0] == 0
        settings = load(ServerConfig, file)
        assert settings.service is not None
        training = Training.open(settings, settings.service)

        class Counting:
            def run(self, round_: int, model: NDArray[np.float32], found: Any = counts) -> RoundOutcome:
                assert round_ == 0 and model.tolist() == [0.0, 0.0, 0.0]
                return RoundOutcome(np.array(found), ("alder", "birch", "cedar"), (), {}, {}, 1.5, 4.0)

        with training.state:
            assert training.run(Counting(), lambda report: None).tolist() == counts
    code, text, _ = typed("trends")
    assert code == 0
    assert text.index("7 days from 2026-11-02 on, 3 merchants, ε = ") < text.index(
        "7 days from 2026-11-09 on"
    )
    first, second = text.split("7 days from 2026-11-09")
    assert "shirt" in first and "%" not in first
    shirt = next(line for line in second.splitlines() if "shirt" in line)
    assert "1,800" in shirt and "+100 %" in shirt
    shoe = next(line for line in second.splitlines() if "shoe" in line)
    assert "4,100" in shoe and shoe.endswith("), or more") and "%" not in shoe
    assert "at most 4,000 queries of a class. In the next plan, say a larger expected_batch." in second
    assert "or more" not in first.lower()
    bag = next(line for line in second.splitlines() if "bag" in line)
    assert " 0 (0 to " in bag and "%" not in bag
    found = json.loads(typed("trends", "--json")[1])
    assert [one["queries"]["value"] for one in found[1]["classes"]] == [1800.0, 4100.0, 0.0]
    assert found[1]["classes"][0]["growth"]["value"] == 1.0 and found[0]["classes"][0]["growth"] is None
    code, _, error = typed("finish")
    assert code != 0 and "no round of this plan is done that a recognizer could be made of" in " ".join(
        error.split()
    )
