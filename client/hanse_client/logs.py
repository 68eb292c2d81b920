"""The daemon's log for when something must be looked into: a file that is put aside before it grows large."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

MAX_BYTES, KEPT = 1 << 20, 3
"""Size of one file, and how many older ones are kept."""


class _Private(RotatingFileHandler):
    """Files for their owner alone: the log may name photos."""

    def _open(self):  # type: ignore[no-untyped-def]
        Path(self.baseFilename).touch(mode=0o600)
        Path(self.baseFilename).chmod(0o600)
        return super()._open()


def log_to(path: Path) -> None:
    """Have everything that is logged go to the file `path`, from level INFO on for our own, WARNING for others'."""
    handler = _Private(path, maxBytes=MAX_BYTES, backupCount=KEPT, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("hanse_client").setLevel(logging.INFO)
