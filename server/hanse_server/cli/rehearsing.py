"""`rehearse`: what the plans of a configuration will cost, shown before they are signed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_common.plan import Cohort, Plan
from hanse_common.vision.centring import Centre
from hanse_server.cli.options import DEFAULT_CONFIG, ConfigOption, say
from hanse_server.config import Blocks, ServerConfig, make_evaluation_plan, make_plan
from hanse_server.forecast import Forecast, forecast
from hanse_server.optimizers import create
from hanse_server.rehearsal import Cost, Rehearsed, Tell
from hanse_server.rehearsal import rehearse as rehearse_rounds

USUAL_DELTA = 1e-5
"""What a merchant's policy allows in all, unless it says otherwise."""


def rehearse(
    config: ConfigOption = DEFAULT_CONFIG,
    merchants: Annotated[
        int | None, typer.Option(help="How many; else as many as the plan takes at most.", min=3, max=300)
    ] = None,
    photos: Annotated[
        int | None, typer.Option(help="Of each merchant; else what the plan reckons with.", min=1, max=60_000)
    ] = None,
    proxy: Annotated[
        Path | None,
        typer.Option(
            help="A folder of public photos, one sub-folder a class, instead of Fashion-MNIST.",
            metavar="FOLDER",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Forecast with a quarter of the photos, once instead of three times."),
    ] = False,
    no_forecast: Annotated[
        bool, typer.Option("--no-forecast", help="Without accuracy and a merchant's time: seconds.")
    ] = False,
) -> None:
    """Show what the plans will cost before they are signed: ε, rounds, bytes, time, and accuracy.

    A few rounds are run on this machine, with made-up merchants. Accuracy is forecast by a simulation on public photos;
    that takes minutes, less the next time, as what was computed of the photos is kept in ~/.cache/hanse.
    """
    settings = load(ServerConfig, config)
    create(settings.optimization.optimizer)
    with _progress("computing the noise") as tell:
        parts = _parts(settings, merchants, tell)
    _show_costs(settings, parts)
    found, reason = None, "left out by --no-forecast"
    if not no_forecast:
        options = ["--config", str(config), "--merchants", str(parts[0].rehearsed.merchants)]
        options += ["--photos", str(photos)] if photos else []
        options += ["--proxy", str(proxy)] if proxy else []
        options += ["--quick"] if quick else []
        with _progress("forecasting") as tell:
            found, reason = forecast(options, tell)
    _show_time(parts, found)
    _show_forecast(found, reason)


@dataclass(frozen=True)
class _Part:
    """One of the plans: what it costs in all."""

    name: str
    epsilon: float
    rehearsed: Rehearsed
    setups: int
    cost: Cost

    @property
    def plan(self) -> Plan:
        return self.rehearsed.plan


def _parts(settings: ServerConfig, merchants: int | None, tell: Tell) -> list[_Part]:
    """Return the training's plan, rehearsed, and the evaluation's behind it, if there is one."""
    cohort, evaluation = settings.plan.cohort, settings.evaluation
    merchants = merchants or cohort.max_merchants
    if not cohort.min_merchants <= merchants <= cohort.max_merchants:
        raise ConfigError(
            f"--merchants: found {merchants}; expected {cohort.min_merchants} to {cohort.max_merchants}, which the "
            "plan asks for (plan.cohort)."
        )
    blocks = (settings.service.blocks if settings.service else Blocks()).rounds
    plans = [("training", make_plan(settings.plan, bytes(16)), blocks, evaluation.every if evaluation else 0)]
    if evaluation is not None:
        # A try is a block of its own.
        plans.append(("evaluation", make_evaluation_plan(settings.plan, evaluation, bytes(16)), 1, 0))
    parts = []
    for name, plan, setup_rounds, every in plans:
        tell(f"rehearsing rounds of the {name}")
        found = rehearse_rounds(plan, merchants, setup_rounds, tell)
        rounds = plan.training.rounds
        parts.append(
            _Part(name, plan.epsilon(), found, found.setups(rounds, every), found.total(rounds, every))
        )
    return parts


def _show_costs(settings: ServerConfig, parts: list[_Part]) -> None:
    """Print ε, rounds and bytes of each plan, and of all together."""
    plan, merchants = parts[0].plan, parts[0].rehearsed.merchants
    say(f"The league {plan.league} with {merchants} merchants, mode {plan.training.mode}.\n")
    together = sum((part.cost for part in parts), Cost())
    epsilon, delta = sum(part.epsilon for part in parts), sum(part.plan.delta for part in parts)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for part in parts:
        table.add_column(part.name, justify="right")
    if len(parts) > 1:
        table.add_column("together", justify="right")

    def row(name: str, values: list[str], total: str) -> None:
        table.add_row(name, *values, *([total] if len(parts) > 1 else []))

    row(f"ε, for any one {plan.training.unit}", [f"{part.epsilon:.3f}" for part in parts], f"{epsilon:.3f}")
    row("δ", [f"{part.plan.delta:g}" for part in parts], f"{delta:g}")
    for name, counts in (
        ("rounds", [part.plan.training.rounds for part in parts]),
        ("that may be repeated, and are paid for", [part.plan.training.repeats for part in parts]),
        ("set-ups of masks", [part.setups for part in parts]),
    ):
        row(name, [f"{count:,}" for count in counts], f"{sum(counts):,}")
    for name, field in (
        ("each merchant sends", "up"),
        ("each merchant receives", "down"),
        ("the server receives", "received"),
        ("the server sends", "sent"),
    ):
        sizes = [getattr(part.cost, field) for part in parts]
        row(name, [_size(size) for size in sizes], _size(getattr(together, field)))
    out.print(table)
    say("")
    centre = _centre(settings)
    if centre is not None:
        epsilon, delta = epsilon + centre.epsilon, delta + centre.delta
        say(
            f"With the centre, ε = {centre.epsilon:.3f} and δ = {centre.delta:g} before, each pays ε = {epsilon:.3f}."
        )
    if delta > USUAL_DELTA * (1 + 1e-9):
        say(
            f"Mind: a merchant's policy allows δ = {USUAL_DELTA:g} in all unless it says otherwise, and this takes "
            f"{delta:g}. Smaller ones under plan.privacy and evaluation.privacy fit."
        )


def _show_time(parts: list[_Part], found: Forecast | None) -> None:
    """Print what was measured here, for the whole of each plan."""
    training = parts[0]
    rounds, cohort = training.plan.training.rounds, training.plan.cohort
    server = sum(part.cost.server_seconds for part in parts)
    say("Time, measured on this machine:")
    _line("the server computes", f"{_time(server)} in all")
    work = training.rehearsed.round.merchant_seconds + (found.round_seconds if found else 0.0)
    if found is not None:
        if found.photo_seconds is not None:
            embedding = _time(found.photos * found.photo_seconds)
            _line("a merchant, once", f"{embedding} to look at its {found.photos:,} photos")
        _line("a merchant, a round", f"{_time(work)}: training and masks")
    least = rounds * _uploaded_after(cohort, work) + server
    slot = (
        f", as uploads leave {cohort.upload_slot:g} s after they were asked for" if cohort.upload_slot else ""
    )
    _line("the rounds take", f"at least {_time(least)}{slot}")
    _line("not in it", "the network, merchants that are slower than this machine, waiting for them to come")
    if cohort.upload_slot and work > cohort.upload_slot:
        say(
            f"Mind: a round's work takes longer than plan.cohort.upload_slot, {cohort.upload_slot:g} s, so that its "
            "time may tell something of a merchant's photos. Make the slot longer."
        )
    say("")


def _show_forecast(found: Forecast | None, reason: str) -> None:
    """Print the accuracy that was forecast, or why there is none."""
    if found is None or not found.accuracies:
        say(f"No forecast of accuracy: {reason}")
        return
    mean = sum(found.accuracies) / len(found.accuracies)
    seeds = len(found.accuracies)
    spread = f" ({100 * min(found.accuracies):.1f} to {100 * max(found.accuracies):.1f} in {seeds} runs)"
    say(
        f"Accuracy, forecast on {found.proxy}: {100 * mean:.1f} %{spread if seeds > 1 else ''}, on "
        f"{found.test_photos:,} photos that no merchant has."
    )
    for note in found.notes:
        say(f"  {note}")
    say("  It tells what privacy costs on photos like these. Your league's may be easier, or harder.")
    if reason:
        say(f"  Not all runs came to an end: {reason}")


def _uploaded_after(cohort: Cohort, work: float) -> float:
    """Return when an upload leaves, in seconds after it was asked for: a whole number of slots later."""
    slot = cohort.upload_slot
    return max(math.ceil(work / slot), 1) * slot if slot else work


def _centre(settings: ServerConfig) -> Centre | None:
    path = settings.service.centre if settings.service else None
    if settings.plan.recipe.centre is None or path is None or not path.exists():
        return None
    return Centre.read(path, settings.plan.recipe.feature_dimension)


@contextmanager
def _progress(what: str) -> Iterator[Tell]:
    """Show what is going on: a line that changes in a terminal, and nothing elsewhere."""
    with out.status(what) as status:
        yield lambda text: status.update(escape(text))


def _line(name: str, text: str) -> None:
    say(f"  {name + ':':22}{text}")


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{max(seconds, 0.01):.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
