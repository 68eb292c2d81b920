"""How long the server's TLS certificate, its chain and its authority are still good, and what to do before they end.

    state = examine(certificate_pem, authority_pem, "league.example", datetime.now(UTC))
    for notice in state.notices:
        print(notice.severity, notice.text)
    metrics.certificate(state.seconds_left)

Merchants trust the authority's file alone, and connect by the host of `service.aggregator.address`. On the day the
first of these certificates ends, or when the host is not in the server's, no merchant comes any more; those that are
connected stay until their stream breaks. A host is compared as in RFC 9525, section 6.3: names letter for letter or
by a wildcard that is the whole first label, addresses as addresses, the subject's common name never.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from hanse_common.errors import ConfigError

WARNING_DAYS = (30, 14, 7, 1)
"""A certificate that ends within so many days is warned of, once for each of these."""


class Severity(StrEnum):
    """How bad it is: an error keeps merchants out now, a warning will."""

    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Notice:
    """Something the operator must do. `days` is the warning's own of `WARNING_DAYS`, 0 for an error.

    `about` names what it is about. Whoever tells each (`about`, `days`) once tells everything, and nothing daily.
    """

    severity: Severity
    about: str
    days: int
    text: str


@dataclass(frozen=True)
class CertificateState:
    """When the first of the certificates that merchants need ends, in how many seconds, and what is to be done."""

    ends: datetime
    seconds_left: float
    notices: tuple[Notice, ...]


def examine(certificate: bytes, authority: bytes, host: str, now: datetime) -> CertificateState:
    """Return how the server's `certificate`, PEM with its chain after it, stands at `now`, an aware time.

    `authority` is the PEM file that merchants have, of one certificate or several. `host` is a name or an address,
    with or without brackets, without port.

    Raises `ConfigError` when there is no certificate in one of them.
    """
    chain = _load(certificate, "service.tls.certificate")
    trusted = _load(authority, "service.tls.authority")
    path, anchor = _path(chain, trusted)
    notices = [
        notice
        for place, found in enumerate(path)
        if (notice := _notice(found, now, _SERVER if place == 0 else _CHAIN))
    ]
    if anchor is None:
        notices.append(
            _error(
                "issuer",
                f"The server's certificate ({_name(chain[0])}) was not issued by the authority that merchants have. "
                "Put the intermediate certificates after it in the file under service.tls.certificate, or name the "
                "authority that issued it under service.tls.authority and give merchants that file.",
            )
        )
    elif anchor not in path and (notice := _notice(anchor, now, _AUTHORITY)):
        notices.append(notice)
    if not covers(chain[0], host):
        notices.append(
            _error(
                "host",
                f"Merchants are told to connect to {host} (service.aggregator.address), but the server's certificate "
                f"is for {', '.join(_hosts(chain[0])) or 'no host'}. Get a certificate that names {host}, or write an "
                "address that it names.",
            )
        )
    ends = min(found.not_valid_after_utc for found in (*path, *([anchor] if anchor else trusted)))
    return CertificateState(
        ends, (ends - now).total_seconds(), tuple(sorted(notices, key=lambda notice: notice.days))
    )


def covers(certificate: x509.Certificate, host: str) -> bool:
    """Return whether `certificate` is for `host`, a name or an address, with or without brackets."""
    names = _alternatives(certificate)
    bare = host.removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        asked = bare.lower().removesuffix(".")
        return any(_matches(pattern.lower(), asked) for pattern in names.get_values_for_type(x509.DNSName))
    return address in names.get_values_for_type(x509.IPAddress)


@dataclass(frozen=True)
class _Role:
    name: str
    remedy: str


_SERVER = _Role(
    name="server's certificate",
    remedy="Get another from the authority, put it under service.tls.certificate and start the server again.",
)
_CHAIN = _Role(
    name="intermediate certificate",
    remedy="Get the new one from the authority, put it after the server's in the file under service.tls.certificate "
    "and start the server again.",
)
_AUTHORITY = _Role(
    name="authority's certificate",
    remedy="Make or get another authority, give merchants a file with both (service.tls.authority), and change the "
    "server's certificate when all of them have it.",
)


def _notice(certificate: x509.Certificate, now: datetime, role: _Role) -> Notice | None:
    """Return what is to be said of one certificate, None when it is good for longer than the first warning."""
    about = f"{role.name} {certificate.serial_number:x}"
    name = f"The {role.name} ({_name(certificate)})"
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        return _error(
            about,
            f"{name} is not good before {begins:%d %B %Y, %H:%M} UTC: no merchant can connect. Check this machine's "
            "clock, or wait.",
        )
    if now > ends:
        return _error(about, f"{name} ended on {ends:%d %B %Y}: no merchant can connect. {role.remedy}")
    days = [days for days in WARNING_DAYS if ends - now <= timedelta(days=days)]
    if not days:
        return None
    left = (ends - now).days
    until = f"in {left} days" if left > 1 else "in a day" if left else "in less than a day"
    text = f"{name} ends {until}, on {ends:%d %B %Y}; no merchant can connect from then on. {role.remedy}"
    return Notice(Severity.WARNING, about, min(days), text)


def _path(
    chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate]
) -> tuple[list[x509.Certificate], x509.Certificate | None]:
    """Return the certificates from the server's up to the authority's, and that authority's, None without one.

    Of several that would do, the one that is good longest is taken, as a merchant's TLS would find one that is good.
    """
    path = [chain[0]]
    longest = sorted(trusted, key=lambda found: found.not_valid_after_utc, reverse=True)
    while True:
        here = path[-1]
        for anchor in longest:
            if anchor == here or _issued(here, anchor):
                return path, anchor
        above = [found for found in chain if found not in path and _issued(here, found)]
        if not above:
            return path, None
        path.append(max(above, key=lambda found: found.not_valid_after_utc))


def _issued(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _load(pem: bytes, key: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion):
        raise ConfigError(f"{key}: found no PEM certificate in this file, expected one or more.") from None


def _alternatives(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return x509.SubjectAlternativeName([])


def _hosts(certificate: x509.Certificate) -> list[str]:
    names = _alternatives(certificate)
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def _name(certificate: x509.Certificate) -> str:
    """Return the common name, for people."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else f"serial number {certificate.serial_number:x}"


def _matches(pattern: str, host: str) -> bool:
    if not pattern.startswith("*."):
        return pattern == host
    first, _, rest = host.partition(".")
    # No TLS library takes a wildcard for all of a top-level domain.
    return bool(first) and rest == pattern[2:] and "." in rest


def _error(about: str, text: str) -> Notice:
    return Notice(Severity.ERROR, about, 0, text)
