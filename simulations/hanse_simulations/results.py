"""What an experiment leaves behind: one folder with figures, pictures, the recognizer and the exact config.

results/smoke/run-001/
  experiment.yaml     the experiment with every default written out
  metrics.csv         round, merchants that uploaded, accuracy, for each evaluated round
  result.json         figures; equal for equal seeds, but for `seconds`
  learning-curve.png  confusion.png  roc.png  server-view.png
  recognizer/         load it with `hanse-client classify --recognizer`
  merchants/NAME/ledger.sqlite
  whitening.safetensors   where the experiment fits one
  centre.safetensors      where the league learnt one
  server/             signed plan, checkpoint, attempts
"""

import csv
import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from hanse_client.ledger import Ledger
from hanse_common import messages
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_common.plan import Plan
from hanse_common.vision.centring import Centre
from hanse_common.vision.metrics import ClassificationReport
from hanse_common.vision.recognizer import CENTRE_FILE, WHITENING_FILE, Recognizer
from hanse_simulations import plots
from hanse_simulations.experiment import CONFIG_FILE, Experiment

METRICS_FILE = "metrics.csv"
RESULT_FILE = "result.json"


class Curve:
    """Accuracy on the public test photos after each evaluated round, counted from 1.

    Kept in the file `path` from round to round, so that a resumed training goes on with it. Raises `ConfigError`
    when the file is there and damaged.
    """

    HEADER = ("round", "merchants", "accuracy")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[int, int, float]] = []
        if path.exists():
            try:
                rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
                self._rows = [(int(r["round"]), int(r["merchants"]), float(r["accuracy"])) for r in rows]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}: found a row without {', '.join(self.HEADER)} ({error})."
                ) from None

    @property
    def rounds(self) -> list[int]:
        """The evaluated rounds."""
        return [row[0] for row in self._rows]

    @property
    def accuracies(self) -> list[float]:
        """The accuracy after each of `rounds`."""
        return [row[2] for row in self._rows]

    def add(self, round_: int, merchants: int, accuracy: float) -> None:
        """Take in a round and write the file."""
        self._rows.append((round_, merchants, accuracy))
        text = io.StringIO()
        csv.writer(text).writerows([self.HEADER, *self._rows])
        write_atomically(self._path, text.getvalue().encode())


def new_folder(root: Path, name: str) -> Path:
    """Make and return the next free `root`/`name`/run-NNN."""
    parent = root / name
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 100_000):
        folder = parent / f"run-{number:03}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"{parent}: holds 99 999 runs already; move some away.")


def write_config(experiment: Experiment, folder: Path) -> None:
    """Write the experiment with all defaults and absolute paths, as YAML that runs again from anywhere.

    Raises `ConfigError` when `folder` holds the results of another experiment.
    """
    data = experiment.data.model_copy(update={"folder": experiment.data.folder.resolve()})
    extensions = tuple(path.resolve() for path in experiment.extensions)
    exact = experiment.model_copy(update={"data": data, "extensions": extensions})
    path = folder / CONFIG_FILE
    if path.exists() and load(Experiment, path) != exact:
        raise ConfigError(f"{folder}: found the results of another experiment or seed; resume with {path}.")
    text = yaml.safe_dump(exact.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(path, text.encode())


def write(
    experiment: Experiment,
    plan: Plan,
    ledgers: Mapping[str, Ledger],
    model: NDArray[np.float32],
    report: ClassificationReport,
    curve: Curve,
    seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """Write figures, pictures and recognizer to `folder`; return the figures. `ledgers` are the merchants'."""
    spent = {name: ledger.spent() for name, ledger in ledgers.items()}
    path = folder / CENTRE_FILE
    centre = Centre.read(path, plan.recipe.feature_dimension) if plan.recipe.centre else None
    cost, failure = (centre.epsilon, centre.delta) if centre else (0.0, 0.0)
    # A trusted curator keeps no ledger.
    epsilon_max = max((one.epsilon for one in spent.values()), default=plan.epsilon() + cost)
    delta = plan.delta + failure
    figures = {
        "name": experiment.name,
        "seed": experiment.seed,
        "accuracy": report.accuracy,
        "macro_f1": report.macro_f1,
        "epsilon_max": epsilon_max,
        "delta": delta,
        "epsilon": {name: one.epsilon for name, one in spent.items()},
        "noise_multiplier": plan.training.noise_multiplier,
        "rounds": curve.rounds,
        "accuracies": curve.accuracies,
        "plan_digest": plan.digest.hex(),
        "vector_digest": messages.model_digest(messages.model_to_bytes(model)).hex(),
        "report": report.to_json(),
        "seconds": seconds,
    }
    write_atomically(folder / RESULT_FILE, json.dumps(figures, indent=2).encode() + b"\n")
    title = f"{experiment.name}: ε = {epsilon_max:.2f}, δ = {delta:g}"
    plots.learning_curve(curve.rounds, curve.accuracies, title, folder / "learning-curve.png")
    plots.confusion(report, plan.taxonomy.classes, folder / "confusion.png")
    plots.roc(report, plan.taxonomy.classes, folder / "roc.png")
    save_recognizer(plan, model, report, epsilon_max, delta, folder / "recognizer")
    return figures


def save_recognizer(
    plan: Plan,
    model: NDArray[np.float32],
    report: ClassificationReport,
    epsilon: float,
    delta: float,
    folder: Path,
) -> None:
    """Save the published model with its card to `folder`. `epsilon` and `delta` are of all that went into it."""
    Recognizer.create(
        plan.recipe,
        plan.taxonomy,
        model,
        created=datetime.now(UTC),
        metrics={"accuracy": report.accuracy, "macro_f1": report.macro_f1, "macro_auc": report.macro_auc},
        epsilon=epsilon,
        delta=delta,
        plan_digest=plan.digest,
        whitening=folder.parent / WHITENING_FILE,
        centre=folder.parent / CENTRE_FILE,
    ).save(folder)
