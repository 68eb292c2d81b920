"""The server's certificate: its end is told in time, and OpenSSL agrees on whom it is for and what it rests on."""

import ssl
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from hanse_common.errors import ConfigError
from hanse_server.certificates import WARNING_DAYS, Severity, covers, examine
from hanse_server.development_keys import DevelopmentKeys, _general_name

NOW = datetime.now(UTC).replace(microsecond=0)
YEAR = 365


class Issued:
    """A certificate with its key. `issuer` None makes an authority, `days` it ends from now on."""

    def __init__(
        self,
        name: str,
        issuer: "Issued | None",
        days: float,
        hosts: tuple[str, ...] = (),
        begins: float = -400,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> None:
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signer = issuer or self
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.certificate.subject if issuer else subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + timedelta(days=begins))
            .not_valid_after(NOW + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=not hosts, path_length=None), critical=True)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        self.certificate = builder.sign(signer.key, hashes.SHA256())
        self.pem = self.certificate.public_bytes(Encoding.PEM)


@pytest.fixture(scope="module")
def authority() -> Issued:
    return Issued("Root", None, 3 * YEAR)


def texts(*arguments: Any, severity: Severity | None = None) -> list[str]:
    notices = examine(*arguments).notices
    return [notice.text for notice in notices if severity is None or notice.severity is severity]


def test_a_good_certificate_is_nothing_to_speak_of(authority: Issued) -> None:
    server = Issued("server", authority, YEAR, ("league.example", "192.0.2.7"))
    for host in ("league.example", "192.0.2.7"):
        state = examine(server.pem, authority.pem, host, NOW)
        assert state.notices == ()
        assert state.ends == NOW + timedelta(days=YEAR)
        assert state.seconds_left == YEAR * 86_400


def test_the_keys_that_the_command_makes_are_good_for_their_hosts(keys: DevelopmentKeys) -> None:
    certificate, authority = keys.certificate.read_bytes(), keys.authority.read_bytes()
    for host in ("localhost", "127.0.0.1"):
        state = examine(certificate, authority, host, NOW)
        assert state.notices == ()
        assert 89 < state.seconds_left / 86_400 < 91


@pytest.mark.parametrize(
    ("left", "stage", "says"),
    [
        (31, None, ""),
        (29.5, 30, "in 29 days"),
        (14, 14, "in 14 days"),
        (7.5, 14, "in 7 days"),
        (6.9, 7, "in 6 days"),
        (1.5, 7, "in a day"),
        (0.5, 1, "in less than a day"),
    ],
)
def test_its_end_is_warned_of_in_stages(authority: Issued, left: float, stage: int | None, says: str) -> None:
    server = Issued("server", authority, left, ("league.example",))
    notices = examine(server.pem, authority.pem, "league.example", NOW).notices
    assert [notice.days for notice in notices] == ([] if stage is None else [stage])
    for notice in notices:
        assert notice.severity is Severity.WARNING
        assert f"The server's certificate (server) ends {says}, on {NOW + timedelta(days=left):%d %B %Y}" in (
            notice.text
        )
        assert "put it under service.tls.certificate" in notice.text


def test_the_stages_are_met_one_after_the_other_as_time_goes_by(authority: Issued) -> None:
    server = Issued("server", authority, 40, ("league.example",))
    met = []
    for hour in range(0, 41 * 24, 6):
        state = examine(server.pem, authority.pem, "league.example", NOW + timedelta(hours=hour))
        met += [notice.days for notice in state.notices if notice.days not in met]
    assert met == [*WARNING_DAYS, 0]


def test_one_that_ended_or_has_not_begun_is_an_error(authority: Issued) -> None:
    ended = Issued("server", authority, -1, ("league.example",))
    early = Issued("server", authority, 90, ("league.example",), begins=1)
    for server, says in ((ended, "ended on"), (early, "is not good before")):
        state = examine(server.pem, authority.pem, "league.example", NOW)
        (notice,) = state.notices
        assert (notice.severity, notice.days) == (Severity.ERROR, 0)
        assert says in notice.text and "no merchant can connect" in notice.text
    assert examine(ended.pem, authority.pem, "league.example", NOW).seconds_left == -86_400


def test_the_chain_and_the_authority_count_too() -> None:
    root = Issued("Root", None, 5)
    middle = Issued("Middle", root, 12)
    server = Issued("server", middle, 200, ("league.example",))
    state = examine(server.pem + middle.pem, root.pem, "league.example", NOW)
    assert state.ends == NOW + timedelta(days=5)
    assert [notice.days for notice in state.notices] == [7, 14]
    assert "The authority's certificate (Root) ends in 5 days" in state.notices[0].text
    assert "give merchants a file with both" in state.notices[0].text
    assert "The intermediate certificate (Middle) ends in 12 days" in state.notices[1].text


def test_what_each_notice_is_about_can_be_told_apart_and_stays_the_same() -> None:
    root = Issued("Root", None, 6)
    server = Issued("server", root, 6, ("shop.example",))

    def told(days: float) -> set[str]:
        notices = examine(server.pem, root.pem, "league.example", NOW + timedelta(days=days)).notices
        return {notice.about for notice in notices}

    assert len(told(0)) == 3
    assert told(0) == told(1) == told(7)


def test_what_the_server_does_not_rest_on_may_end() -> None:
    root, other = Issued("Root", None, YEAR), Issued("Old root", None, -5)
    server = Issued("server", root, 200, ("league.example",))
    stray = Issued("Stray", other, 2)
    assert examine(server.pem + stray.pem, other.pem + root.pem, "league.example", NOW).notices == ()


@pytest.mark.parametrize("newer_first", [True, False])
def test_of_a_renewed_intermediate_or_authority_the_one_that_is_good_longest_counts(
    newer_first: bool,
) -> None:
    root = Issued("Root", None, 5)
    renewed_root = Issued("Root", None, YEAR, key=root.key)
    middle = Issued("Middle", root, 5)
    renewed = Issued("Middle", root, 300, key=middle.key)
    server = Issued("server", middle, 200, ("league.example",))
    middles, roots = [renewed.pem, middle.pem], [renewed_root.pem, root.pem]
    if not newer_first:
        middles, roots = middles[::-1], roots[::-1]
    state = examine(server.pem + b"".join(middles), b"".join(roots), "league.example", NOW)
    assert state.notices == ()
    assert state.ends == NOW + timedelta(days=200)


def test_another_authority_is_an_error(authority: Issued) -> None:
    middle = Issued("Middle", authority, YEAR)
    server = Issued("server", middle, YEAR, ("league.example",))
    (said,) = texts(server.pem, authority.pem, "league.example", NOW, severity=Severity.ERROR)
    assert "was not issued by the authority that merchants have" in said
    assert not texts(server.pem + middle.pem, authority.pem, "league.example", NOW)


def test_an_authority_of_the_same_name_is_not_the_same() -> None:
    server = Issued("server", Issued("Root", None, YEAR), YEAR, ("league.example",))
    assert len(texts(server.pem, Issued("Root", None, YEAR).pem, "league.example", NOW)) == 1


def test_a_host_that_is_not_named_is_an_error_that_says_which_are(authority: Issued) -> None:
    server = Issued("server", authority, YEAR, ("shop.example", "192.0.2.7"))
    (said,) = texts(server.pem, authority.pem, "league.example", NOW, severity=Severity.ERROR)
    assert "connect to league.example (service.aggregator.address)" in said
    assert "for shop.example, 192.0.2.7" in said


def test_a_certificate_without_any_host_says_so(authority: Issued) -> None:
    (said,) = texts(Issued("league.example", authority, YEAR).pem, authority.pem, "league.example", NOW)
    assert "is for no host" in said


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_without_certificate_is_named(authority: Issued, which: int) -> None:
    server = Issued("server", authority, YEAR, ("league.example",))
    for wrong in (b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        files = [server.pem, authority.pem]
        files[which] = wrong
        with pytest.raises(ConfigError, match=("certificate: found", "authority: found")[which]):
            examine(*files, "league.example", NOW)


@pytest.fixture
def openssl_agrees(tmp_path: Path) -> Callable[[bytes, Issued, bytes, str], bool]:
    """Whether a TLS client that trusts the authority's PEM, and asks for the host, takes the server's chain."""

    def shake(chain: bytes, server: Issued, authority: bytes, host: str) -> bool:
        (tmp_path / "chain").write_bytes(chain)
        secret = server.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / "key").write_bytes(secret)
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        theirs.load_cert_chain(tmp_path / "chain", tmp_path / "key")
        ours = ssl.create_default_context(cadata=authority.decode())
        ours.hostname_checks_common_name = False  # gRPC's BoringSSL has no such thing
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = ours.wrap_bio(down, up, server_hostname=host)
        listener = theirs.wrap_bio(up, down, server_side=True)
        for _ in range(3):
            try:
                client.do_handshake()
                return True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError:
                return False
            with suppress(ssl.SSLWantReadError):
                listener.do_handshake()
        raise AssertionError("the handshake did not end")

    return shake


@pytest.mark.parametrize(
    "named", ["league.example", "*.example", "*.league.example", "192.0.2.7", "2001:db8::7"]
)
def test_openssl_agrees_on_hosts(
    authority: Issued, openssl_agrees: Callable[[bytes, Issued, bytes, str], bool], named: str
) -> None:
    server = Issued("league.example", authority, YEAR, (named,))
    for host in (
        "league.example",
        "LEAGUE.example",
        "a.league.example",
        "b.a.league.example",
        "example",
        "xleague.example",
        "192.0.2.7",
        "192.0.2.8",
        "2001:db8::7",
        "2001:db8:0:0::7",
    ):
        assert covers(server.certificate, host) == openssl_agrees(server.pem, server, authority.pem, host), (
            host
        )
    assert covers(server.certificate, "[2001:db8::7]") == covers(server.certificate, "2001:db8::7")


@pytest.mark.parametrize("days", [(YEAR, YEAR, YEAR), (-1, YEAR, YEAR), (YEAR, -1, YEAR), (YEAR, YEAR, -1)])
@pytest.mark.parametrize("complete", [True, False])
def test_openssl_agrees_on_what_is_an_error(
    openssl_agrees: Callable[[bytes, Issued, bytes, str], bool], days: tuple[int, int, int], complete: bool
) -> None:
    root = Issued("Root", None, days[2])
    middle = Issued("Middle", root, days[1])
    server = Issued("server", middle, days[0], ("league.example",))
    chain = server.pem + middle.pem if complete else server.pem
    errors = texts(chain, root.pem, "league.example", NOW, severity=Severity.ERROR)
    assert bool(errors) != openssl_agrees(chain, server, root.pem, "league.example")
