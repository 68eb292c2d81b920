"""Is everything as it must be to take part? One check after the other, and for each failure what to do.

    for finding in examine(config): print(finding.mark, finding.name, finding.text, finding.remedy)

Nothing is sent but what any connection begins with, nothing is spent, and nothing is changed.
"""

import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib import metadata

import httpx
from cryptography import x509

from hanse_client.config import ClientConfig
from hanse_client.control import Control
from hanse_client.keys import load_identity, load_node
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_common import signing
from hanse_common.errors import ConfigError, HanseError
from hanse_common.files import read_bounded

EXIT_CODE = 25
"""Of `hanse-client doctor` when something must be mended."""

SECONDS = 10.0
"""Bound of each connection."""

CLOCK_SECONDS = 60.0
"""How far the clock may be from the server's."""

FREE_BYTES, SCANT_BYTES = 200 << 20, 2 << 30
SOON = timedelta(days=14)
MAX_PEM_BYTES = 1 << 20


class Mark(StrEnum):
    """How a check ended."""

    WELL = "ok"
    SOON = "soon"
    """It works, but something should be done."""
    BAD = "bad"
    SKIPPED = "-"


@dataclass(frozen=True)
class Finding:
    """One check: its name, how it ended, what was found, and what to do about it."""

    name: str
    mark: Mark
    text: str
    remedy: str = ""


def examine(config: ClientConfig) -> Iterator[Finding]:
    """Yield a finding for each check, as they are done. A check that fails unexpectedly is a finding, too."""
    for name, check in _CHECKS:
        try:
            yield from check(config)
        except HanseError as error:
            yield Finding(name, Mark.BAD, str(error), "See the text, and client/exit-codes.")
        except Exception as error:
            yield Finding(name, Mark.BAD, f"{type(error).__name__}: {error}", "Please report this.")


def _keys(config: ClientConfig) -> Iterator[Finding]:
    identity = signing.public_bytes(load_identity(config))
    load_node(config)
    yield Finding("keys", Mark.WELL, f"identity {identity.hex()[:16]} and the node's key can be read")


def _disk(config: ClientConfig) -> Iterator[Finding]:
    folder = next(path for path in (config.state, *config.state.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB are free for {config.state}"
    if free < FREE_BYTES:
        yield Finding(
            "disk", Mark.BAD, text, "Free some space: without it nothing can be charged or trained."
        )
    elif free < SCANT_BYTES:
        yield Finding("disk", Mark.SOON, text, "Free some space before it runs out.")
    else:
        yield Finding("disk", Mark.WELL, text)


def _stack(config: ClientConfig) -> Iterator[Finding]:
    from hanse_client.examples import device_name  # torch takes seconds to load

    where = device_name(config.device)
    names = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "opacus", "flwr"))
    yield Finding("computing", Mark.WELL, f"on {where}, with {names}")


def _catalog(config: ClientConfig) -> Iterator[Finding]:
    from hanse_client.shop import Shop

    found = Shop(config).catalog()
    text = f"{len(found.train)} photos to train on, {len(found.holdout)} held out, {len(found.problems)} can't be used"
    if found.unmapped or found.problems:
        yield Finding("photos", Mark.SOON, text, "hanse-client catalog says which, and what is missing.")
    else:
        yield Finding("photos", Mark.WELL, text)


def _ledger(config: ClientConfig) -> Iterator[Finding]:
    if not config.ledger_path.exists():
        yield Finding("ledger", Mark.WELL, "there is none yet; it is made with the first training")
        return
    kept = Ledger(config.ledger_path, config.policy.budget)
    kept.verify()
    spent = kept.spent().epsilon
    text = f"{kept.counter} entries, none altered; ε = {spent:.3f} of {config.policy.epsilon:g} is spent"
    if spent >= config.policy.epsilon:
        yield Finding("ledger", Mark.SOON, text, "The budget is used up: no further plan fits.")
    else:
        yield Finding("ledger", Mark.WELL, text)


def _directory(config: ClientConfig) -> Iterator[Finding]:
    seen = None
    if config.markers_path.exists():
        seen = Markers(config.markers_path).directory(bytes.fromhex(config.league.charter))
    if seen is None:
        yield Finding(
            "directory", Mark.SKIPPED, "not seen yet; it comes with the first training", "hanse-client join"
        )
        return
    own = signing.public_bytes(load_identity(config))
    entry = next((entry for entry in seen.entries if entry.identity == own), None)
    if entry is None:
        yield Finding(
            "directory",
            Mark.BAD,
            f"version {seen.version} does not list this shop",
            "Ask to be listed (hanse-client join), or whether you were removed.",
        )
        return
    ends = datetime.fromtimestamp(min(seen.expires, entry.expires, 1 << 37), UTC)
    text = f"version {seen.version}, {len(seen.entries)} members, you until {ends:%d %B %Y}"
    yield _dated("directory", text, ends, "Ask those who hold the league's key for the next one.")


def _authority(config: ClientConfig) -> Iterator[Finding]:
    if config.connection is None:
        yield Finding(
            "connection", Mark.BAD, "the section connection is missing", "hanse-client init writes it."
        )
        return
    data = read_bounded(config.connection.authority, MAX_PEM_BYTES, "a PEM certificate", ConfigError)
    ends = min(certificate.not_valid_after_utc for certificate in x509.load_pem_x509_certificates(data))
    text = f"the authority's certificate is good until {ends:%d %B %Y}"
    yield _dated("authority", text, ends, "Ask the operator for the next one.")


def _server(config: ClientConfig) -> Iterator[Finding]:
    """Look at the channel for nodes: its certificate, whether it answers, and what time it has."""
    if config.connection is None:
        return
    address = config.connection.server
    context = _context(config)
    ends = _certificate_end(address, context, None)
    if isinstance(ends, Finding):
        yield ends
        return
    text = f"{address} answers; its certificate is good until {ends:%d %B %Y}"
    yield _dated("server", text, ends, "Tell the operator.")
    with suppress(httpx.HTTPError, ValueError, KeyError):
        with httpx.Client(verify=context, timeout=SECONDS, trust_env=False) as client:
            answer = client.get(f"https://{address}/health")
        if answer.status_code != httpx.codes.OK:
            yield Finding("server", Mark.BAD, f"it answers with {answer.status_code}", "Tell the operator.")
        off = (datetime.now(UTC) - parsedate_to_datetime(answer.headers["date"])).total_seconds()
        if abs(off) > CLOCK_SECONDS:
            yield Finding(
                "clock",
                Mark.BAD,
                f"this clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server's",
                "Set it, best by the network (NTP): directories and certificates go by it.",
            )
        else:
            yield Finding("clock", Mark.WELL, f"within {max(1, round(abs(off)))} s of the server's")


def _streams(config: ClientConfig) -> Iterator[Finding]:
    """Look at the channel for rounds, whose address came with the last training."""
    address = Control(config.state).aggregator()
    if address is None or config.connection is None:
        yield Finding(
            "rounds", Mark.SKIPPED, "their address is not known yet; it comes with the first training"
        )
        return
    ends = _certificate_end(address, _context(config), "h2")
    if isinstance(ends, Finding):
        yield ends
    else:
        yield Finding("rounds", Mark.WELL, f"{address} answers")


def _certificate_end(address: str, context: ssl.SSLContext, protocol: str | None) -> datetime | Finding:
    """Return until when the certificate shown at `address` is good, or what is wrong there."""
    name = "rounds" if protocol else "server"
    host, _, port = address.rpartition(":")
    if protocol:
        context.set_alpn_protocols([protocol])
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host.strip("[]")) as secured,
        ):
            shown = secured.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        return Finding(
            name,
            Mark.BAD,
            f"{address} shows a certificate that is not to be believed: {error.verify_message}",
            "If this clock is right: ask the operator whether the certificate or the authority changed.",
        )
    except (OSError, ValueError) as error:
        return Finding(
            name,
            Mark.BAD,
            f"{address} does not answer ({error})",
            "Is this machine online, and does its firewall let it out to this port? Else ask the operator.",
        )
    return x509.load_der_x509_certificate(shown).not_valid_after_utc


def _context(config: ClientConfig) -> ssl.SSLContext:
    path = config.connection.authority if config.connection else config.state
    data = read_bounded(path, MAX_PEM_BYTES, "a PEM certificate", ConfigError)
    try:
        return ssl.create_default_context(cadata=data.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise ConfigError(f"{path}: found no PEM certificate ({error}); ask the operator for it.") from None


def _dated(name: str, text: str, ends: datetime, remedy: str) -> Finding:
    left = ends - datetime.now(UTC)
    if left < timedelta(0):
        return Finding(name, Mark.BAD, text.replace("is good until", "ended on"), remedy)
    return Finding(name, Mark.SOON, text, remedy) if left < SOON else Finding(name, Mark.WELL, text)


_CHECKS: tuple[tuple[str, Callable[[ClientConfig], Iterator[Finding]]], ...] = (
    ("keys", _keys),
    ("disk", _disk),
    ("computing", _stack),
    ("photos", _catalog),
    ("ledger", _ledger),
    ("authority", _authority),
    ("server", _server),
    ("rounds", _streams),
    ("directory", _directory),
)
