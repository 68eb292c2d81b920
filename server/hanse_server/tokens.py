"""The operator's secrets for this machine: the admin token, and one that reads metrics and nothing else.

    token = read_token(service.admin.token)
    reading = metrics_token(token)          # for Prometheus

Who has the admin token commands the server, so a program that only reads gets one made of it: it opens `/metrics`, and
the admin token cannot be computed from it.
"""

import hashlib
import hmac
import re
from pathlib import Path

from hanse_common.errors import ConfigError
from hanse_common.files import read_bounded

MAX_TOKEN_BYTES = 1024
MIN_TOKEN_BYTES = 32
METRICS_TOKEN_FILE = "metrics.token"  # noqa: S105 - a file's name
_PRINTABLE = re.compile(rb"[!-~]*")


def read_token(path: Path) -> bytes:
    """Return the admin token in the file `path`. Raises `ConfigError` unless it is long and printable."""
    token = read_bounded(path, MAX_TOKEN_BYTES, "the admin token, a long random text", ConfigError).strip()
    if len(token) < MIN_TOKEN_BYTES or not _PRINTABLE.fullmatch(token):
        raise ConfigError(
            f"{path}: found {len(token)} characters, expected at least {MIN_TOKEN_BYTES} random ones, printable, "
            "without spaces; make it with hanse-server keys."
        )
    return token


def metrics_token(admin: bytes) -> bytes:
    """Return the token that reads metrics: HMAC-SHA256 of a fixed text under the admin token, in hexadecimal digits."""
    return hmac.digest(admin, b"hanse metrics token 1", hashlib.sha256).hex().encode()
