"""What is signed: `keygen`, `check`, `fit-whitening`, `sign`. Only `fit-whitening` needs torch."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hanse_common import commands, signing, wire
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import PhotoError
from hanse_common.files import PUBLIC, write_atomically
from hanse_common.plan import Plan, SignedPlan, noise_shares
from hanse_server.cli.options import DEFAULT_CONFIG, ConfigOption, require_new, say
from hanse_server.config import ServerConfig, make_evaluation_plan, make_plan
from hanse_server.optimizers import create
from hanse_server.public_photos import decoded, photo_files, spread


def keygen(
    path: Annotated[Path, typer.Argument(help="Where to write the signing key.", metavar="FILE")],
) -> None:
    """Make the key that signs plans. Give merchants the public half, FILE.pub; show the other to nobody."""
    key = signing.create_key(path)
    out.print(f"Wrote {path} (secret) and {path}.pub. Merchants pin this under operator_key:")
    out.print(signing.public_bytes(key).hex())


def check(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Check the configuration and show what its plans cost each merchant. Nothing is written."""
    settings = load(ServerConfig, config)
    create(settings.optimization.optimizer)
    describe(make_plan(settings.plan, bytes(16)))
    if settings.evaluation is not None:
        say("")
        describe(make_evaluation_plan(settings.plan, settings.evaluation, bytes(16)))


def sign(
    config: ConfigOption = DEFAULT_CONFIG,
    plan_file: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the plan.", metavar="FILE")
    ] = Path("plan.hanse"),
    evaluation_file: Annotated[
        Path, typer.Option("--evaluation-out", help="Where to write the evaluation's plan.", metavar="FILE")
    ] = Path("evaluation.hanse"),
) -> None:
    """Sign the plan that the configuration describes, for merchants to judge (hanse-client explain).

    With a section `evaluation` in it, the plan by which models are tried is signed, too.
    """
    settings = load(ServerConfig, config)
    require_new(plan_file)
    if settings.evaluation is not None:
        require_new(evaluation_file)
    create(settings.optimization.optimizer)
    key = signing.load_key(settings.signing_key)
    made = [(plan_file, make_plan(settings.plan, os.urandom(16)))]
    if settings.evaluation is not None:
        made.append(
            (evaluation_file, make_evaluation_plan(settings.plan, settings.evaluation, os.urandom(16)))
        )
    for path, plan in made:
        write_atomically(path, wire.encode(SignedPlan.sign(plan, key)), PUBLIC)
        describe(plan)
        say(f"Signed as {plan.digest.hex()[:16]} in {path}.")


def fit_whitening(
    photos: Annotated[Path, typer.Argument(help="Folder of public photos, searched.", metavar="PHOTOS")],
    dimensions: Annotated[int, typer.Option(help="Numbers that a photo becomes.", min=1, max=1 << 14)] = 192,
    whitening_file: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the whitening.", metavar="FILE")
    ] = Path("whitening.safetensors"),
    config: ConfigOption = DEFAULT_CONFIG,
    limit: Annotated[
        int, typer.Option(help="Use at most this many photos, spread evenly over the sorted paths.", min=1)
    ] = 10_000,
    weights: Annotated[
        Path | None, typer.Option(help="Local file of the backbone's weights.", metavar="FILE")
    ] = None,
) -> None:
    """Fit the recipe's whitening to public reference photos, without labels. Then sign a plan that names it.

    The photos must be nobody's secret: what is fitted to them is given to every merchant.
    """
    from hanse_server.whitening import fit_whitening as fit  # torch takes seconds to load

    require_new(whitening_file)
    recipe = load(ServerConfig, config).plan.recipe
    paths = photo_files(photos)
    taken = spread(paths, limit)
    with out.status(f"looking at {len(taken)} photos"):
        fitted = fit(recipe, decoded(taken, _left_out), dimensions, weights)
    write_atomically(whitening_file, fitted.file, PUBLIC)
    out.print(
        f"Wrote {whitening_file}, fitted to {fitted.photos} of {len(paths)} files. Give it to every merchant."
    )
    out.print("In your configuration, put these lines under plan.recipe.backbone (and no projection):")
    out.print(f"  whitening:\n    dimensions: {dimensions}\n    weights: {fitted.name.weights}", markup=False)


def _left_out(error: PhotoError) -> None:
    commands.err.print(f"left out: {error}", markup=False)


def describe(plan: Plan) -> None:
    """Print what a plan is and costs."""
    training, most = plan.training, plan.cohort.max_merchants
    epsilon = plan.epsilon()
    repeats = f" (and up to {training.repeats} repeated)" if training.repeats else ""
    count = noise_shares(training, plan.cohort)
    shares = f", in {count} shares of honest merchants" if count > 1 else ""
    lines = (
        ("league", plan.league),
        ("classes", ", ".join(plan.taxonomy.classes)),
        ("trained numbers", f"{plan.dimension:,}, so an upload of {4 * plan.dimension / 1e6:.2f} MB a round"),
        ("rounds", f"{training.rounds}{repeats}, mode {training.mode}"),
        ("steps a round", str(training.steps_per_round)),
        ("each merchant pays", f"ε = {epsilon:.3f} at δ = {plan.delta:g}, for any one {training.unit}"),
        (
            "noise multiplier",
            f"{training.noise_multiplier:.3f} at sampling rate {training.sampling_rate:g}{shares}",
        ),
        (
            "a round needs",
            f"{plan.cohort.min_merchants} merchants, takes at most {plan.cohort.max_merchants}",
        ),
        ("masking", f"holds against {plan.cohort.max_corrupt} corrupt members of the league"),
        ("of a full cohort", f"{plan.cohort.parameters.dropouts(most)} of {most} may drop out of a round"),
    )
    for name, text in lines:
        out.print(f"{name + ':':20}{text}", markup=False)
