"""One experiment at several points and seeds: ε against accuracy, resumable run by run.

    frontier = run_sweep(experiment, Path("results/frontier/league"), cache)
    frontier.points[0].mean, frontier.points[0].interval
    figures = run_frontiers([(league, "local"), (league, "central")], Path("results/frontier"), cache)

Each run is an ordinary run in a folder of its own. One whose `result.json` is there is done and is not repeated; one
that was stopped goes on from its checkpoint.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_simulations import plots
from hanse_simulations.console import console
from hanse_simulations.experiment import Experiment
from hanse_simulations.frontier import Frontier, Point, summary
from hanse_simulations.results import RESULT_FILE, write_config
from hanse_simulations.run import Engine, ShopsMaker, run, shops_maker

FRONTIER_FILE = "frontier.json"
PICTURE = "frontier.png"


def run_sweep(experiment: Experiment, folder: Path, cache: Path, engine: Engine = "local") -> Frontier:
    """Run what is left of the experiment's sweep in `folder`, write `frontier.json`, and return the frontier.

    Raises `ConfigError` when the experiment has no sweep, or `folder` holds another one's results.
    """
    sweep = experiment.sweep
    if sweep is None:
        raise ConfigError(f"{experiment.name}: expected a section sweep with seeds and points, found none.")
    shops = shops_maker(cache)
    found: dict[int, list[dict[str, Any]]] = {}
    runs = [(seed, index) for seed in sweep.seeds for index in range(len(sweep.points))]
    for number, (seed, index) in enumerate(runs, start=1):
        variant = experiment.at(index, seed)
        own = folder / f"point-{index + 1}-seed-{seed}"
        label = f"ε = {variant.plan.privacy.epsilon:g}, seed {seed}"
        console.print(f"{experiment.name} ({number} of {len(runs)}): {label}")
        figures = _done(variant, own) or _go(variant, own, cache, engine, shops)
        console.print(f"  accuracy {100 * figures['accuracy']:.2f} %, ε at most {figures['epsilon_max']:.3f}")
        found.setdefault(index, []).append(figures)
    frontier = Frontier(experiment.name, tuple(sorted(map(_point, found.values()), key=lambda p: p.epsilon)))
    write_atomically(folder / FRONTIER_FILE, json.dumps(frontier.to_json(), indent=2).encode() + b"\n")
    return frontier


def run_frontiers(wanted: Sequence[tuple[Experiment, Engine]], folder: Path, cache: Path) -> dict[str, Any]:
    """Run what is left of each sweep, draw all of them in `folder`/frontier.png, and return their figures.

    The picture is drawn anew after each sweep. Raises as `run_sweep` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Frontier] = []
    for experiment, engine in wanted:
        name = experiment.name if engine == "local" else f"{experiment.name} ({engine})"
        own = folder / (experiment.name if engine == "local" else f"{experiment.name}-{engine}")
        frontier = run_sweep(experiment, own, cache, engine)
        found.append(Frontier(name, frontier.points))
        plots.frontier(found, folder / PICTURE)
    for one in found:
        console.print(f"[bold]{one.name}[/bold]")
        for line in summary(one):
            console.print(f"  {line}")
    console.print(f"Everything is in {folder}; the figure is {folder / PICTURE}.")
    return {"frontiers": [one.to_json() for one in found]}


def _go(variant: Experiment, folder: Path, cache: Path, engine: Engine, shops: ShopsMaker) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return run(variant, folder, cache, engine, shops)


def _done(variant: Experiment, folder: Path) -> dict[str, Any] | None:
    """Return the figures of a finished run of `variant`.

    Raises `ConfigError` when they make no sense, or are another experiment's.
    """
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    write_config(variant, folder)
    try:
        figures: dict[str, Any] = json.loads(path.read_bytes())
        _ = float(figures["accuracy"]), float(figures["epsilon_max"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: found no figures of a run; remove the folder to run it again.") from None
    return figures


def _point(runs: Sequence[dict[str, Any]]) -> Point:
    return Point(max(run["epsilon_max"] for run in runs), tuple(run["accuracy"] for run in runs))
