"""What the commands share: the configuration's option, the service's section, and how text is printed."""

from pathlib import Path
from typing import Annotated

import typer

from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_server.config import ServerConfig, Service

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Your configuration.", metavar="FILE")]
DEFAULT_CONFIG = Path("hanse-server.yaml")


def settings_of(path: Path) -> tuple[ServerConfig, Service]:
    """Return the configuration and its section `service`. Raises `ConfigError` when that is missing."""
    settings = load(ServerConfig, path)
    if settings.service is None:
        raise ConfigError(f"{path}: service: missing; expected a section with plan, state, tls, …")
    return settings, settings.service


def say(text: str) -> None:
    """Print `text` as it is: names may look like rich's markup or emoji codes."""
    out.print(text, markup=False, emoji=False)


def require_new(path: Path) -> None:
    """Raise `ConfigError` unless the file `path` can be made: found out before the work, not after it."""
    if path.exists():
        raise ConfigError(f"{path}: there is a file already; move it away or name another.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first.")
