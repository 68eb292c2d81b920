"""The doctor, against a real server on loopback: each thing that can be wrong is found, with what to do about it."""

import json
import shutil
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from hanse_client import cli, doctor
from hanse_client.config import ClientConfig
from hanse_client.control import Control
from hanse_client.doctor import EXIT_CODE, Finding, Mark, examine
from hanse_client.journal import Journal
from hanse_client.markers import Markers
from hanse_common import signing
from hanse_common.charter import founded
from hanse_common.directory import Directory, Entry
from hanse_server.config import Tls
from hanse_server.development_keys import DevelopmentKeys, make_keys
from hanse_server.flower_link import SuperLink
from hanse_server.stream import StreamServer

LEAGUE = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
"""As in conftest."""

Harm = Callable[[ClientConfig, pytest.MonkeyPatch], object]


@pytest.fixture
def config(settings: dict[str, Any], link: SuperLink) -> ClientConfig:
    settings["connection"]["server"] = f"localhost:{link.fleet_port}"
    return ClientConfig.model_validate(settings)


def found(config: ClientConfig) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(config)}


def list_shop(config: ClientConfig, *, expires: float, listed: bool = True) -> None:
    """Have the shop see a directory that lists it, or others alone."""
    charter = founded("test", LEAGUE).read()
    identity = (
        signing.load_public(config.identity_path.with_name("identity.key.pub")) if listed else bytes(32)
    )
    until = int((datetime.now(UTC) + timedelta(days=expires)).timestamp())
    entry = Entry(name="alder", entity="Alder", identity=identity, expires=until)
    directory = Directory(league="test", charter=charter.digest, version=1, expires=until, entries=(entry,))
    Markers(config.markers_path).see_directory(directory, (charter,))


def test_all_is_well(config: ClientConfig, keys: DevelopmentKeys) -> None:
    list_shop(config, expires=90)
    certificate, key = keys.certificate.read_bytes(), keys.key.read_bytes()
    with StreamServer("127.0.0.1", 0, certificate, key, dict) as streams:
        Control(config.state).note_aggregator(f"localhost:{streams.port}")
        findings = found(config)
    assert {finding.mark for finding in findings.values()} == {Mark.WELL}, findings
    assert set(findings) == {
        *(
            "keys",
            "disk",
            "computing",
            "photos",
            "ledger",
            "authority",
            "server",
            "clock",
            "rounds",
            "directory",
        )
    }


def test_before_the_first_training_what_is_not_known_is_no_fault(config: ClientConfig) -> None:
    findings = found(config)
    assert findings["rounds"].mark is findings["directory"].mark is Mark.SKIPPED
    assert not config.ledger_path.exists(), "it changes nothing"


def used_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


HARM: dict[str, tuple[str, Mark, Harm, str]] = {
    "no key": ("keys", Mark.BAD, lambda c, m: c.identity_path.unlink(), "hanse-client init"),
    "a key for everybody": ("keys", Mark.BAD, lambda c, m: c.node_key_path.chmod(0o644), "chmod 600"),
    "no photos": ("photos", Mark.BAD, lambda c, m: shutil.rmtree(c.photos), "Check the path"),
    "unmapped labels": (
        "photos",
        Mark.SOON,
        lambda c, m: (c.photos / "shoe").rename(c.photos / "Schuhe"),
        "hanse-client catalog",
    ),
    "a damaged ledger": (
        "ledger",
        Mark.BAD,
        lambda c, m: c.ledger_path.write_bytes(b"x" * 5000),
        "Take part in",
    ),
    "a full disk": (
        "disk",
        Mark.BAD,
        lambda c, m: m.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1)),
        "Free some space",
    ),
    "rounds that are gone": (
        "rounds",
        Mark.BAD,
        lambda c, m: Control(c.state).note_aggregator(f"localhost:{used_port()}"),
        "firewall",
    ),
    "a directory without this shop": (
        "directory",
        Mark.BAD,
        lambda c, m: list_shop(c, expires=90, listed=False),
        "hanse-client join",
    ),
    "an entry that ends soon": (
        "directory",
        Mark.SOON,
        lambda c, m: list_shop(c, expires=5),
        "hold the league's key",
    ),
    "an entry that is over": (
        "directory",
        Mark.BAD,
        lambda c, m: list_shop(c, expires=-5),
        "hold the league's key",
    ),
    "damaged marks": (
        "directory",
        Mark.BAD,
        lambda c, m: c.markers_path.write_bytes(b"x" * 5000),
        "move it away",
    ),
}


@pytest.mark.parametrize("case", HARM)
def test_what_is_wrong_is_found_and_the_rest_is_still_looked_at(
    config: ClientConfig, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, mark, harm, remedy = HARM[case]
    harm(config, monkeypatch)
    findings = found(config)
    assert findings[name].mark is mark
    assert remedy in findings[name].remedy + findings[name].text
    assert {"keys", "disk", "photos", "ledger", "server", "directory"} <= set(findings)


def test_a_server_that_does_not_answer(config: ClientConfig, settings: dict[str, Any]) -> None:
    settings["connection"]["server"] = f"localhost:{used_port()}"
    finding = found(ClientConfig.model_validate(settings))["server"]
    assert finding.mark is Mark.BAD and "does not answer" in finding.text


def test_a_server_of_another_authority(
    settings: dict[str, Any], config: ClientConfig, tmp_path: Path
) -> None:
    settings["connection"]["authority"] = make_keys(tmp_path / "other", ("localhost",), ()).authority
    finding = found(ClientConfig.model_validate(settings))["server"]
    assert finding.mark is Mark.BAD and "not to be believed" in finding.text


def test_a_certificate_that_has_expired(
    settings: dict[str, Any], make_service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse_server.development_keys.CERTIFICATE_DAYS", -0.01)
    other = make_keys(tmp_path / "other", ("localhost",), ())
    tls = Tls(authority=other.authority, certificate=other.certificate, key=other.key)
    settings["connection"]["authority"] = other.authority
    with SuperLink(make_service(tls=tls)) as link:
        settings["connection"]["server"] = f"localhost:{link.fleet_port}"
        finding = found(ClientConfig.model_validate(settings))["server"]
    assert finding.mark is Mark.BAD and "expired" in finding.text


def test_a_clock_that_is_wrong(config: ClientConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(datetime):
        @classmethod
        def now(cls, zone: Any = None) -> datetime:
            return datetime.now(zone) - timedelta(minutes=5)

    monkeypatch.setattr(doctor, "datetime", Late)
    finding = found(config)["clock"]
    assert finding.mark is Mark.BAD and "behind the server's" in finding.text


def test_a_check_that_breaks_is_a_finding(config: ClientConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(config: ClientConfig) -> Any:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "_CHECKS", (("disk", breaks), *doctor._CHECKS[:1]))
    findings = found(config)
    assert findings["disk"].mark is Mark.BAD and "ZeroDivisionError" in findings["disk"].text
    assert findings["keys"].mark is Mark.WELL


# -- the commands that an owner types -----------------------------------------------------------------------------


@pytest.fixture
def type_(
    settings: dict[str, Any], config: ClientConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "hanse-client.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return lambda *words: CliRunner().invoke(cli.app, [*words, "-c", str(path)])


def test_doctor_in_words_and_for_programs(type_: Any, config: ClientConfig) -> None:
    result = type_("doctor")
    assert result.exit_code == 0, result.output
    assert "ok    keys: identity" in result.output
    config.identity_path.unlink()
    result = type_("doctor")
    assert result.exit_code == EXIT_CODE
    assert "bad   keys: " in result.output and "What to do: " in result.output
    lines = [json.loads(line) for line in type_("doctor", "--json").output.splitlines()]
    assert {line["check"]: line["mark"] for line in lines}["keys"] == "bad"


def test_status_pause_and_history(type_: Any, config: ClientConfig) -> None:
    result = type_("status")
    assert result.exit_code == 1 and "it has not run yet" in result.output
    assert json.loads(type_("status", "--json").output)["state"] == "stopped"
    assert "Nothing has happened yet." in type_("history").output
    for number in range(5):
        Journal(config.state).note("round", f"Round {number}. [red]", round=number)
    assert type_("history", "--last", "2").output.splitlines()[-1].endswith("Round 4. [red]")
    assert json.loads(type_("history", "--last", "1", "--json").output)["facts"] == {"round": 4}
    assert "Paused until you say" in type_("pause").output
    assert Control(config.state).paused_until(datetime.now(UTC)) is not None
    assert "takes part again" in type_("resume").output
    assert Control(config.state).paused_until(datetime.now(UTC)) is None
    type_("pause", "8h")
    until = Control(config.state).paused_until(datetime.now(UTC))
    assert until is not None and timedelta(hours=7.9) < until - datetime.now(UTC) < timedelta(hours=8.1)
    for wrong in ("8", "h", "0h", "8w"):
        assert "expected a number and m, h or d" in str(type_("pause", wrong).exception)


def test_the_log_turns_over(tmp_path: Path) -> None:
    """A year of lines fits in some megabytes, and nobody else reads them."""
    import logging
    import subprocess
    import sys

    script = (
        "import logging, sys; from pathlib import Path; from hanse_client import logs\n"
        "logs.MAX_BYTES = 10_000; logs.log_to(Path(sys.argv[1]))\n"
        "for number in range(5000): logging.getLogger('hanse_client.x').info('line %d', number)\n"
        "logging.getLogger('other').info('not this')"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "daemon.log"], check=True, timeout=60)
    files = sorted(tmp_path.glob("daemon.log*"))
    assert len(files) == 4 and sum(file.stat().st_size for file in files) < 45_000
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    text = files[0].read_text()
    assert "line 4999" in text and "not this" not in text
    assert logging.getLogger().handlers != []
