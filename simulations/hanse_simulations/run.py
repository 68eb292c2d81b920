"""Run an experiment from its YAML to its result folder, telling a person what happens.

    figures = run(experiment, new_folder(Path("results"), experiment.name), cache)

Both the experiments and the demo end in `train_and_write`.
"""

import runpy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from hanse_client.training import Examples, resolve_device
from hanse_common.errors import ConfigError
from hanse_common.vision.recognizer import WHITENING_FILE
from hanse_server.evaluation import Evaluator
from hanse_server.league import RoundReport
from hanse_server.optimizers import create
from hanse_simulations import results
from hanse_simulations.console import bar, console
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import make_shops, whitened
from hanse_simulations.simulation import League, Member, seeded_members


def load_extensions(experiment: Experiment) -> None:
    """Run the experiment's own Python files, which register its algorithms. They are the researcher's code.

    Raises `ConfigError` when one is missing, or the experiment's optimizer is not known then or wrong.
    """
    for path in experiment.extensions:
        if not path.is_file():
            raise ConfigError(f"{path}: extensions: no such file, expected a Python file.")
        runpy.run_path(str(path), run_name=f"hanse_extension_{path.stem}")
    create(experiment.optimization.optimizer)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread. Two are hardly faster here, and on a busy machine they spend their time waiting
    for each other: embedding on two busy cores took ten times as long with two threads as with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def run(experiment: Experiment, folder: Path, cache: Path) -> dict[str, Any]:
    """Run or resume `experiment` in `folder` and return its figures. `cache` keeps embeddings between runs."""
    started = time.perf_counter()
    load_extensions(experiment)
    results.write_config(experiment, folder)
    whitening = folder / WHITENING_FILE
    experiment = whitened(experiment, whitening)
    with bar("embedding", 1) as shown:
        shops = make_shops(experiment, cache, whitening, resolve_device("auto"), shown.update)
    members = seeded_members(experiment, shops.merchants, folder, tell)
    return train_and_write(experiment, members, shops.test, folder, started)


def tell(merchant: str, text: str) -> None:
    """Print what a merchant's owner would be told."""
    console.print(f"  [yellow]{merchant}[/yellow]: ", escape(text), sep="", soft_wrap=True)


def train_and_write(
    experiment: Experiment, members: Mapping[str, Member], test: Examples, folder: Path, started: float
) -> dict[str, Any]:
    """Train the league of `members`, evaluate on `test`, write `folder`, and return the figures."""
    league = League.assemble(experiment, members, folder)
    plan = league.plan
    evaluator = Evaluator(plan.recipe, plan.taxonomy, test.inputs, test.labels)
    curve = results.Curve(folder / results.METRICS_FILE)
    with bar("rounds", plan.training.rounds, tenths=True) as shown:

        def on_round(done: RoundReport) -> None:
            number, merchants = done.round + 1, len(done.outcome.uploaded)
            if number % experiment.evaluate_every == 0 or number == plan.training.rounds:
                curve.add(number, merchants, evaluator.accuracy(done.published))
            text = f"{merchants} merchants"
            if curve.accuracies:
                text += f", accuracy {100 * curve.accuracies[-1]:.1f} %"
            shown.update(number, text=text)

        model = league.train(on_round)
    report = evaluator.report(model)
    ledgers = {name: member.ledger for name, member in members.items()}
    seconds = time.perf_counter() - started
    return results.write(experiment, plan, ledgers, model, report, curve, seconds, folder)
