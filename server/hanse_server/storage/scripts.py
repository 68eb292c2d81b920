"""The migrations that this release has: what alembic runs to bring a database from one schema to another.

newest()                                # "0002"
known_versions()                        # ("0001", "0002")
command.upgrade(alembic_config(connection), "head")
"""

from functools import cache
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from hanse_common.errors import StorageError

MIGRATIONS = Path(__file__).parent / "migrations"


def alembic_config(connection: Connection | None) -> Config:
    """Return what alembic must know to migrate the database behind `connection`."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


@cache
def known_versions() -> tuple[str, ...]:
    """Return the versions of the schema that this release knows, the first one first."""
    scripts = ScriptDirectory.from_config(alembic_config(None)).walk_revisions()
    return tuple(reversed([script.revision for script in scripts]))


def newest() -> str:
    """Return the version of this release's schema."""
    known = known_versions()
    if not known:
        raise StorageError("This release has no schema; install it again.")
    return known[-1]
