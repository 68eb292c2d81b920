"""Training with the merchants: `run`, `resume`, `stop`, `serve`, `status`, `page`."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hanse_common import commands
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_server.cli.options import DEFAULT_CONFIG, ConfigOption, say, settings_of
from hanse_server.config import ServerConfig
from hanse_server.evaluations import described
from hanse_server.overview import Overview, overview
from hanse_server.storage import State

if TYPE_CHECKING:
    from hanse_server.reporting import Event, Tell

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]

STOP_SECONDS = 60.0
POLL_SECONDS = 0.25


def run(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Train the signed plan with the merchants of your league, keep the recognizer as a candidate, and end.

    Stopped or killed, it goes on after the last finished round with hanse-server resume.

    Exit codes: 0 trained, 16 a round failed for good, 18 stopped.
    """
    _train(config, as_json, resume=False)


def resume(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Go on with a training that was stopped, killed or failed, after its last finished round."""
    _train(config, as_json, resume=True)


def stop(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Ask the training that is going on to stop, and wait until it has. hanse-server resume goes on."""
    _, service = settings_of(config)
    with State.open(service.state, service.storage) as state:
        asked = state.history.request_stop()
        if asked is None:
            say("Nothing is being trained.")
            return
        given_up = time.monotonic() + STOP_SECONDS
        while time.monotonic() < given_up:
            found = state.history.last_run()
            if found is None or found.state != "running":
                say(f"Stopped. {found.reason if found else ''}".rstrip())
                return
            time.sleep(POLL_SECONDS)
    say(
        f"Run {asked} has not stopped within {STOP_SECONDS:.0f} s. If its process is gone, hanse-server resume goes on."
    )


def serve(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Wait for merchants, and train when `flwr run` says so, until you stop it."""
    from hanse_server.daemon import Daemon  # Flower takes seconds to load

    daemon = Daemon(load(ServerConfig, config), _teller(as_json))
    with commands.until_stopped() as stopped:
        daemon.serve(stopped)


def status(
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Show how far the training is, who takes part, which figures it has, and which recognizer is released."""
    _, service = settings_of(config)
    with State.open(service.state, service.storage) as state:
        found = overview(state)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    for name, text in _lines(found):
        say(f"{name + ':':22}{text}")


def page(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Serve your page by itself, over what is recorded, until you stop it. With run or serve it is there anyway."""
    from hanse_common.web.serving import HOST, listen, serving
    from hanse_server.page import application
    from hanse_server.tokens import read_token

    _, service = settings_of(config)
    if service.page is None:
        raise ConfigError(f"{config}: service.page: found null, expected a section with a port.")
    token = read_token(service.admin.token)
    with (
        commands.until_stopped() as stopped,
        State.open(service.state, service.storage) as state,
        listen(service.page.port) as listening,
    ):
        port = listening.getsockname()[1]
        app = application(state, None, None, token, port=port, service=service)
        with serving(app, listening):
            say(f"Your page: http://{HOST}:{port}. It asks for the token in {service.admin.token}.")
            stopped.wait()


def _train(config: Path, as_json: bool, *, resume: bool) -> None:
    from hanse_server.daemon import Daemon  # Flower takes seconds to load

    daemon = Daemon(load(ServerConfig, config), _teller(as_json))
    with commands.until_stopped() as stopped:
        daemon.train(stopped, resume=resume)


def _teller(as_json: bool) -> "Tell":
    """Return what prints the daemon's events: lines with the time for people, JSON for programs."""

    def tell(event: "Event") -> None:
        if as_json:
            typer.echo(json.dumps({"kind": event.kind, "text": event.text} | event.facts))
        else:
            say(f"{datetime.now():%H:%M:%S}  {event.text}")

    return tell


def _lines(found: Overview) -> list[tuple[str, str]]:
    """Return what `status` shows, as names and texts."""
    lines: list[tuple[str, str]] = []
    if found.run is None:
        return [("training", "none was begun; see hanse-server run.")]
    run = found.run
    state = {"running": "is going on", "lost": "was lost: its process ended without a word"}.get(
        run.state, run.state
    )
    lines.append(("run", f"{run.number}, begun {_day(run.begun)}, {state}. {run.reason}".rstrip()))
    lines.append(("plan", f"{run.plan[:16]}, mode {found.mode}"))
    lines.append(("rounds done", f"{found.rounds_done} of {found.rounds}"))
    if found.last_round is not None:
        lines.append(("last round", f"{_roles(found.last_round)}, {_day(found.last_round_at)}"))
    if found.directory is not None:
        members, expires = len(found.directory.members), _day(found.directory.expires)
        lines.append(
            ("directory", f"version {found.directory.version}, {members} members, good until {expires}")
        )
    for name, epsilon in found.spent.items():
        lines.append((f"{name} spent", f"ε = {epsilon:.3f} in all, as it says"))
    if found.figures:
        after, report = found.figures[-1]
        lines.append((f"figures, round {after}", described(report)))
    lines.append(("released", "none yet" if found.released is None else f"version {found.released.number}"))
    candidates = [str(one.number) for one in found.versions if one.state == "candidate"]
    if candidates:
        lines.append(("candidates", f"{', '.join(candidates)}; see hanse-server publish"))
    lines.append(("audit log", f"{found.audit_head or 'empty'}"))
    return lines


def _roles(participants: Mapping[str, str]) -> str:
    counted = Counter(participants.values())
    return ", ".join(
        f"{counted[role]} {role}" for role in ("uploaded", "dropped", "declined", "blamed") if counted[role]
    )


def _day(seconds: Any) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
