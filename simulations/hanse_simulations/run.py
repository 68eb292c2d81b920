"""Run an experiment from its YAML to its result folder, telling a person what happens.

    figures = run(experiment, new_folder(Path("results"), experiment.name), cache)

Both the experiments and the demo end in `train_and_write`.
"""

import runpy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape

from hanse_client.examples import Examples, resolve_device
from hanse_client.ledger import Ledger
from hanse_common.errors import ConfigError
from hanse_common.plan import Plan
from hanse_common.vision.recognizer import WHITENING_FILE
from hanse_server.evaluation import Evaluator
from hanse_server.league import RoundReport
from hanse_server.optimizers import create
from hanse_simulations import plots, results
from hanse_simulations.central import CentralLeague
from hanse_simulations.centre import with_centre
from hanse_simulations.console import bar, console
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import Shops, make_shops, whitened
from hanse_simulations.simulation import League, seeded_members

Engine = Literal["local", "flower", "central", "pooled"]
"""Where merchants run: in this process, or in Ray's, which Flower's own engine starts. Or one curator has it all, with
its own noise (central) or with that of a league's shares (pooled)."""


class AnyLeague(Protocol):
    """What `train_and_write` needs of a league."""

    @property
    def plan(self) -> Plan:
        """The plan that is trained."""
        ...

    @property
    def ledgers(self) -> Mapping[str, Ledger]:
        """The merchants' ledgers, by name."""
        ...

    def train(self, on_round: Callable[[RoundReport], None]) -> NDArray[np.float32]:
        """Run the rounds that are left and return the published model, shape (d,). Raises `RoundFailed`."""
        ...


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


ShopsMaker = Callable[[Experiment, Path], Shops]
"""Makes the shops of an experiment whose whitening, if any, is in the file."""


def shops_maker(cache: Path) -> ShopsMaker:
    """Return a maker of shops that shows its progress. `cache` keeps embeddings; the last shops are kept in memory."""
    last: list[tuple[tuple[object, ...], Shops]] = []

    def make(experiment: Experiment, whitening: Path) -> Shops:
        key = (
            experiment.data, experiment.seed, experiment.whiten, experiment.plan.recipe, experiment.attack,
        )  # fmt: skip
        if not last or last[0][0] != key:
            last.clear()
            with bar("embedding", 1) as shown:
                shops = make_shops(experiment, cache, whitening, resolve_device("auto"), shown.update)
            last.append((key, shops))
        return last[0][1]

    return make


@one_thread()
def run(
    experiment: Experiment,
    folder: Path,
    cache: Path,
    engine: Engine = "local",
    make: ShopsMaker | None = None,
) -> dict[str, Any]:
    """Run or resume `experiment` in `folder` on `engine` and return its figures.

    `cache` keeps embeddings between runs, `make` whole shops between the runs of a sweep.
    """
    started = time.perf_counter()
    if experiment.attack is not None and engine != "local":
        raise ConfigError(f"attack: found one, and the engine {engine}; run it without --engine.")
    load_extensions(experiment)
    results.write_config(experiment, folder)
    whitening = folder / WHITENING_FILE
    experiment = whitened(experiment, whitening)
    shops = (make or shops_maker(cache))(experiment, whitening)
    total = experiment.plan.privacy
    is_curator = engine in ("central", "pooled")
    experiment, shops = with_centre(experiment, shops, folder, tell, central=is_curator)
    league: AnyLeague
    if engine == "flower":
        from hanse_simulations.flower_engine import FlowerLeague

        console.print("  Flower's engine: one message a round and merchant, without secure aggregation")
        league = FlowerLeague.assemble(experiment, folder, cache, tell)
    elif is_curator:
        uploads = experiment.data.merchants if engine == "pooled" else None
        what = "the yardstick, not a league" if uploads is None else f"with the noise of {uploads} merchants"
        console.print(f"  One trusted curator with all photos: {what}")
        league = CentralLeague.assemble(experiment, shops.merchants, folder, uploads)
    else:
        members = seeded_members(experiment, shops.merchants, folder, tell, total)
        league = League.assemble(experiment, members, folder)
    return train_and_write(experiment, league, shops.test, folder, started)


def tell(merchant: str, text: str) -> None:
    """Print what a merchant's owner would be told."""
    console.print(f"  [yellow]{merchant}[/yellow]: ", escape(text), sep="", soft_wrap=True)


def train_and_write(
    experiment: Experiment, league: AnyLeague, test: Examples, folder: Path, started: float
) -> dict[str, Any]:
    """Train `league`, evaluate on `test`, write `folder`, and return the figures."""
    plan = league.plan
    evaluator = Evaluator(plan.recipe, plan.taxonomy, test.inputs, test.labels)
    curve = results.Curve(folder / results.METRICS_FILE)
    with bar("rounds", plan.training.rounds, tenths=True) as shown:

        def on_round(done: RoundReport) -> None:
            number, merchants = done.round + 1, len(done.outcome.uploaded)
            if number % experiment.evaluate_every == 0 or number == plan.training.rounds:
                curve.add(number, merchants, evaluator.accuracy(done.published))
            texts = [f"{merchants} merchants"] if merchants else []
            if curve.accuracies:
                texts.append(f"accuracy {100 * curve.accuracies[-1]:.1f} %")
            text = ", ".join(texts)
            shown.update(number, text=text)

        model = league.train(on_round)
    if isinstance(league, League) and len(league.seen) == 2:
        (upload,) = (residues for name, residues in league.seen.items() if name)
        total = plan.decode(league.seen[""], 1)
        plots.server_view(upload, total, len(plan.taxonomy.classes), folder / "server-view.png")
    report = evaluator.report(model)
    seconds = time.perf_counter() - started
    return results.write(experiment, plan, league.ledgers, model, report, curve, seconds, folder)
