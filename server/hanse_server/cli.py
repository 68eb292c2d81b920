"""The command `hanse-server`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hanse_common import commands, signing, wire
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_common.plan import Plan, SignedPlan
from hanse_server.config import ServerConfig, make_plan
from hanse_server.optimizers import create

app = commands.new_app(
    "The operator's side of a Hanse league: make a signing key, see what a plan costs the merchants, and sign it. "
    "The server coordinates; it never sees a photo."
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Your configuration.", metavar="FILE")]
DEFAULT_CONFIG = Path("hanse-server.yaml")


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="Where to write the signing key.", metavar="FILE")],
) -> None:
    """Make the key that signs plans. Give merchants the public half, FILE.pub; show the other to nobody."""
    key = signing.create_key(path)
    out.print(f"Wrote {path} (secret) and {path}.pub. Merchants pin this under operator_key:")
    out.print(signing.public_bytes(key).hex())


@app.command()
def check(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Check the configuration and show what its plan costs each merchant. Nothing is written."""
    settings = load(ServerConfig, config)
    create(settings.optimization.optimizer)
    _describe(make_plan(settings.plan, bytes(16)))


@app.command()
def sign(
    config: ConfigOption = DEFAULT_CONFIG,
    plan_file: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the plan.", metavar="FILE")
    ] = Path("plan.hanse"),
) -> None:
    """Sign the plan that the configuration describes, for merchants to judge (hanse-client explain)."""
    settings = load(ServerConfig, config)
    create(settings.optimization.optimizer)
    key = signing.load_key(settings.signing_key)
    plan = make_plan(settings.plan, os.urandom(16))
    if plan_file.exists():
        raise ConfigError(f"{plan_file}: there is a plan already; move it away or name another file.")
    write_atomically(plan_file, wire.encode(SignedPlan.sign(plan, key)))
    _describe(plan)
    out.print(f"Signed as {plan.digest.hex()[:16]} in {plan_file}.")


def _describe(plan: Plan) -> None:
    training = plan.training
    epsilon = plan.mechanism(training.total_steps).epsilon(plan.delta)
    repeats = f" (and up to {training.repeats} repeated)" if training.repeats else ""
    lines = (
        ("league", plan.league),
        ("classes", ", ".join(plan.taxonomy.classes)),
        ("trained numbers", f"{plan.dimension:,}, so an upload of {4 * plan.dimension / 1e6:.2f} MB a round"),
        ("rounds", f"{training.rounds}{repeats} of {training.local_steps} steps, mode {training.mode}"),
        ("each merchant pays", f"ε = {epsilon:.3f} at δ = {plan.delta:g}, for any one photo"),
        ("noise multiplier", f"{training.noise_multiplier:.3f} at sampling rate {training.sampling_rate:g}"),
        (
            "a round needs",
            f"{plan.cohort.min_merchants} merchants, takes at most {plan.cohort.max_merchants}",
        ),
    )
    for name, text in lines:
        out.print(f"{name + ':':20}{text}", markup=False)


def main() -> None:
    """Run `hanse-server`."""
    commands.run(app)
