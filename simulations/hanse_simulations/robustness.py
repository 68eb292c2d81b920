"""What attackers cost a league, and what the check of the sum's norm stops: a table of attacks, modes and seeds.

    study = load(Study, Path("simulations/experiments/robustness.yaml"))
    rows = run_study(study, Path("results/robustness"), cache)
    print(table(rows))

Each run is a whole league with its own ledgers and secure aggregation, in which the last merchants attack in every
round (`attacks`). Its figures stay in the folder, so that a study that was stopped goes on where it was.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from pydantic import Field, model_validator

from hanse_client.examples import resolve_device
from hanse_common.config import Section
from hanse_common.errors import ConfigError, RoundFailed
from hanse_common.files import write_atomically
from hanse_common.vision.recipe import Recipe
from hanse_server.evaluation import Evaluator
from hanse_server.league import RoundReport
from hanse_simulations import plots
from hanse_simulations.attacks import Attack, Backdoor
from hanse_simulations.console import console
from hanse_simulations.experiment import Experiment, Sweep, Value
from hanse_simulations.run import one_thread, tell
from hanse_simulations.shops import make_shops, whitened
from hanse_simulations.simulation import League, seeded_members

PICTURE = "robustness.png"
FIGURES_FILE = "robustness.json"
OUTCOME_FILE = "outcome.json"


class Study(Section):
    """One `experiment`, in each of `modes`, without attackers and under each of `attacks`, with each of `seeds`.

    A mode names what is different in it, by dotted keys, as a sweep's point does.
    """

    experiment: Experiment
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 63)], ...], Field(min_length=1, max_length=20)]
    modes: Annotated[dict[str, dict[str, Value]], Field(min_length=1, max_length=10)]
    attacks: Annotated[tuple[Attack, ...], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _possible(self) -> "Study":
        for _ in self.runs():
            pass
        return self

    def runs(self) -> Iterator[tuple[str, Experiment]]:
        """Yield each run's mode and experiment. Raises `ValueError` when one makes no sense."""
        dumped = [attack.model_dump(mode="json") for attack in self.attacks]
        for mode, changes in self.modes.items():
            points = tuple({**changes, "attack": attack} for attack in dumped)
            swept = self.experiment.model_copy(update={"sweep": Sweep(seeds=self.seeds, points=points)})
            for index in range(len(points)):
                for seed in self.seeds:
                    yield mode, swept.at(index, seed)


@dataclass(frozen=True)
class Outcome:
    """One run's end.

    `accuracy` on the public test photos; `success`, with a backdoor, is the share of triggered test photos of other
    classes that are taken for its target. Both are None when a round failed: `failed_round`, from 1, with its `reason`.
    `largest` is the largest norm of a sum that was used, over its bound.
    """

    mode: str
    attack: str
    merchants: int
    seed: int
    accuracy: float | None
    success: float | None
    failed_round: int | None
    reason: str
    largest: float


@dataclass(frozen=True)
class Row:
    """One line of the table: all seeds of a mode and an attack."""

    mode: str
    attack: str
    merchants: int
    runs: tuple[Outcome, ...]

    @property
    def stopped(self) -> int:
        """How many of the runs ended in a round that failed."""
        return sum(run.failed_round is not None for run in self.runs)

    @property
    def accuracy(self) -> float | None:
        """The mean accuracy of the runs that came to an end."""
        return _mean([run.accuracy for run in self.runs])

    @property
    def success(self) -> float | None:
        """The mean success of a backdoor."""
        return _mean([run.success for run in self.runs])

    @property
    def largest(self) -> float:
        """The largest norm of a sum that was used, over its bound; 0 if none was used."""
        return max(run.largest for run in self.runs)


@one_thread()
def run_study(study: Study, folder: Path, cache: Path) -> list[Row]:
    """Run what is left of the study in `folder`, draw its picture, and return the table's rows.

    `cache` keeps embeddings. Raises `ConfigError` when `folder` holds something else.
    """
    outcomes = []
    runs = list(study.runs())
    recipes: dict[str, Recipe] = {}  # a whitening is fitted to public photos, so all runs share it
    for number, (mode, experiment) in enumerate(runs, start=1):
        attack = experiment.attack
        if attack is None:
            continue
        own, kept = folder / f"run-{number:03}", experiment.model_dump(mode="json")
        outcome = _done(mode, kept, own)
        if outcome is None:
            key = json.dumps([kept["whiten"], kept["plan"]["recipe"]])
            file = (
                folder
                / f"whitening-{list(recipes).index(key) if key in recipes else len(recipes)}.safetensors"
            )
            if key not in recipes:
                recipes[key] = whitened(experiment, file).plan.recipe
            plan = experiment.plan.model_copy(update={"recipe": recipes[key]})
            outcome = attacked(mode, experiment.model_copy(update={"plan": plan}), own, cache, file)
            found = {"experiment": kept, "outcome": asdict(outcome)}
            write_atomically(own / OUTCOME_FILE, json.dumps(found, indent=2).encode() + b"\n")
        outcomes.append(outcome)
        label = f"{mode}, {attack.merchants} attack: {attack.label}"
        console.print(f"{number} of {len(runs)}: {label}: {_words(outcome)}", soft_wrap=True)
    rows = [
        Row(*key, tuple(group))
        for key, group in groupby(outcomes, key=lambda run: (run.mode, run.attack, run.merchants))
    ]
    figures = {"rows": [asdict(row) for row in rows]}
    write_atomically(folder / FIGURES_FILE, json.dumps(figures, indent=2).encode() + b"\n")
    plots.robustness(rows, folder / PICTURE)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| mode | attackers | attack | accuracy, % | backdoor works, % | largest norm / bound | stopped |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stopped = f"{row.stopped} of {len(row.runs)}" if row.stopped else "no"
        attack = row.attack if row.merchants else "nobody attacks"
        largest = "–" if row.stopped == len(row.runs) else f"{row.largest:.2f}"
        lines.append(
            f"| {row.mode} | {row.merchants} | {attack} | {_percent(row.accuracy)} | {_percent(row.success)} "
            f"| {largest} | {stopped} |"
        )
    return "\n".join(lines)


def attacked(mode: str, experiment: Experiment, folder: Path, cache: Path, whitening: Path) -> Outcome:
    """Run one league under its attack and return how it ended; its files go to `folder`.

    `whitening` is the file that the experiment's recipe names, if it names one. Raises `ConfigError` when the
    experiment has no attack.
    """
    attack = experiment.attack
    if attack is None:
        raise ConfigError(f"{experiment.name}: expected a section attack, found none.")
    folder.mkdir(parents=True, exist_ok=True)
    shops = make_shops(experiment, cache, whitening, resolve_device("auto"), lambda done, total: None)
    league = League.assemble(experiment, seeded_members(experiment, shops.merchants, folder, tell), folder)
    largest, rounds = 0.0, 0

    def on_round(report: RoundReport) -> None:
        nonlocal largest, rounds
        largest, rounds = max(largest, report.outcome.norm / report.outcome.bound), report.round + 1

    end: dict[str, Any] = {"accuracy": None, "success": None, "failed_round": None, "reason": ""}
    try:
        model = league.train(on_round)
    except RoundFailed as failure:
        end |= {"failed_round": rounds + 1, "reason": str(failure)}
    else:
        recipe, taxonomy = league.plan.recipe, league.plan.taxonomy
        end["accuracy"] = Evaluator(recipe, taxonomy, shops.test.inputs, shops.test.labels).accuracy(model)
        if isinstance(attack, Backdoor) and shops.triggered is not None:
            seen = shops.triggered
            found = Evaluator(recipe, taxonomy, seen.inputs, seen.labels).probabilities(model).argmax(1)
            end["success"] = float((found == taxonomy.classes.index(attack.target)).mean())
    return Outcome(mode, attack.label, attack.merchants, experiment.seed, **end, largest=largest)


def _done(mode: str, experiment: dict[str, Any], folder: Path) -> Outcome | None:
    """Return the outcome of a finished run. Raises `ConfigError` when it is another experiment's or makes no sense."""
    path = folder / OUTCOME_FILE
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_bytes())
        outcome = Outcome(**kept["outcome"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: found no outcome of a run; remove the folder to run it again.") from None
    if (kept["experiment"], outcome.mode) != (experiment, mode):
        raise ConfigError(f"{path}: found another study's run; name another folder.")
    return outcome


def _words(outcome: Outcome) -> str:
    if outcome.failed_round is not None:
        return f"stopped in round {outcome.failed_round}"
    text = f"accuracy {_percent(outcome.accuracy)} %"
    return text if outcome.success is None else f"{text}, backdoor works for {_percent(outcome.success)} %"


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return mean(found) if found else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
