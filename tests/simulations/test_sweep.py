"""A sweep: every point and seed once, resumable, and a frontier with honest intervals."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from typer.testing import CliRunner

from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_simulations import sweep
from hanse_simulations.cli import app
from hanse_simulations.experiment import Experiment
from hanse_simulations.frontier import Frontier, Point, summary

Write = Callable[..., Path]

SWEEP: dict[str, Any] = {
    "plan.training": {
        "mode": "distributed",
        "rounds": 2,
        "sampling_rate": 0.5,
        "expected_batch": 90,
        "clipping_norm": 0.5,
    },
    "optimization.optimizer": {"name": "fedavg", "learning_rate": 2},
    "sweep": {
        "seeds": [3, 4],
        "points": [{"plan.privacy.epsilon": 1}, {"plan.privacy.epsilon": 0.5, "plan.training.rounds": 3}],
    },
}


def test_a_point_differs_where_it_says(write_experiment: Write) -> None:
    experiment = load(Experiment, write_experiment(SWEEP))
    one = experiment.at(1, 4)
    assert (one.seed, one.plan.privacy.epsilon, one.plan.training.rounds) == (4, 0.5, 3)
    assert one.sweep is None
    other = experiment.at(0, 3)
    assert (other.plan.privacy.epsilon, other.plan.training.rounds) == (1, 2)
    assert other.data == experiment.data


@pytest.mark.parametrize(
    ("point", "match"),
    [
        ({"plan.privacy.epsilon": "much"}, r"sweep\.points\.0.*plan\.privacy\.epsilon"),
        ({"plan.privacy.epsilom": 1}, r"sweep\.points\.0.*epsilom"),
        ({"seeds.first.last": 1}, r"seeds\.first\.last"),
        ({"seed.first": 1}, r"seed\.first"),
        ({"plan.cohort.min_merchants": 300}, r"sweep\.points\.0"),
    ],
)
def test_a_point_that_makes_no_sense_is_named(
    write_experiment: Write, point: dict[str, Any], match: str
) -> None:
    changes = SWEEP | {"sweep": {"seeds": [1], "points": [point]}}
    with pytest.raises(ConfigError, match=match):
        load(Experiment, write_experiment(changes))


def test_what_is_done_is_not_done_again(
    write_experiment: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load(Experiment, write_experiment(SWEEP))
    folder, cache = tmp_path / "sweep", tmp_path / "embeddings.sqlite"
    ran: list[Path] = []
    original = sweep.run

    def run(variant: Experiment, own: Path, *arguments: Any) -> dict[str, Any]:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(own)
        return original(variant, own, *arguments)

    monkeypatch.setattr(sweep, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(experiment, folder, cache)
    assert not (folder / "frontier.json").exists()
    ran.clear()
    frontier = sweep.run_sweep(experiment, folder, cache)
    assert [own.name for own in ran] == ["point-2-seed-4"]
    assert [round(point.epsilon, 2) for point in frontier.points] == [0.5, 1]
    assert [len(point.accuracies) for point in frontier.points] == [2, 2]
    assert json.loads((folder / "frontier.json").read_bytes()) == frontier.to_json()
    (folder / "point-1-seed-3" / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"point-1-seed-3.*remove the folder"):
        sweep.run_sweep(experiment, folder, cache)


@pytest.mark.slow
def test_the_command_draws_league_and_yardstick_in_one_figure(
    write_experiment: Write, tmp_path: Path
) -> None:
    path = write_experiment(SWEEP)
    arguments = ["frontier", str(path), "--central", str(path), "--folder", str(tmp_path / "f")]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "f.json")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "f" / "frontier.png").stat().st_size > 10_000
    named = [one["name"] for one in json.loads((tmp_path / "f.json").read_text())["frontiers"]]
    assert named == ["tiny", "tiny (central)"]
    assert "mean of 2 seeds" in result.output
    short = write_experiment(SWEEP | {"sweep": {"seeds": [3], "points": [{"plan.privacy.epsilon": 1}]}})
    again = CliRunner().invoke(app, ["run", str(short), "--results", str(tmp_path / "r")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "r" / "tiny" / "run-001" / "frontier.png").exists()


def test_an_experiment_without_a_sweep_has_no_frontier(write_experiment: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a section sweep"):
        sweep.run_sweep(load(Experiment, write_experiment()), tmp_path, tmp_path / "cache")


def test_intervals_are_students() -> None:
    point = Point(1.0, (0.9, 0.91, 0.92))
    low, high = stats.t.interval(0.95, 2, loc=0.91, scale=0.01 / math.sqrt(3))
    assert point.mean == pytest.approx(0.91)
    assert point.interval == pytest.approx((high - low) / 2)
    assert Point(1.0, (0.9,)).interval == 0
    (line,) = summary(Frontier("x", (point,)))
    assert "91.00 ± 2.48 %" in line
