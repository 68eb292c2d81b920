"""The list of members, as whoever holds the league's key writes and signs it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from hanse_client import cli
from hanse_client.member_list import MemberList
from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.directory import SignedDirectory
from hanse_common.errors import ConfigError

MEMBERS: dict[str, Any] = {
    "league": "textiles",
    "version": 4,
    "days": 30,
    "members": {
        name: {"entity": f"{name} Ltd", "identity": f"{number:02x}" * 32}
        for number, name in enumerate(("birch", "alder", "cedar"), start=0xA1)
    },
}


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Return a function that types `hanse-client sign-directory …` in an empty folder and returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def type_in(*words: str, **changes: Any) -> int:
        Path("members.yaml").write_text(yaml.safe_dump(MEMBERS | changes))
        monkeypatch.setattr("sys.argv", ["hanse-client", "sign-directory", "members.yaml", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return type_in


def test_it_is_signed_and_the_key_is_kept(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed() == 0
    said = capsys.readouterr().out
    league_key = signing.load_public(Path("league.key.pub"))
    assert "version 4, 3 members" in said
    assert league_key.hex() in said.replace("\n", "")
    signed = wire.decode(SignedDirectory, Path("directory.hanse").read_bytes())
    now = datetime.now(UTC)
    opened = signed.open(league_key, now.timestamp())
    assert [entry.name for entry in opened.entries] == ["alder", "birch", "cedar"]
    assert opened.identities()["alder"] == bytes.fromhex("a2" * 32)
    assert opened.expires == pytest.approx((now + timedelta(days=30)).timestamp(), abs=60)
    assert Path("league.key").stat().st_mode & 0o777 == 0o600
    # The next version is signed with the same key.
    assert typed(version=5) == 0
    again = wire.decode(SignedDirectory, Path("directory.hanse").read_bytes())
    assert again.open(league_key, now.timestamp()).version == 5


def test_mistakes_are_said_and_nothing_is_signed(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    members = MEMBERS["members"]
    for changes, word in (
        ({"members": {name: members[name] for name in ("alder", "birch")}}, "members"),
        ({"members": members | {"damson": dict(members["alder"])}}, "twice"),
        ({"members": members | {"damson": {"entity": "x", "identity": "zz"}}}, "identity"),
        ({"version": 0}, "version"),
    ):
        assert typed(**changes) == ConfigError.exit_code
        assert word in capsys.readouterr().err
    assert not Path("directory.hanse").exists()
    assert not Path("league.key").exists()


def test_the_guides_example_is_a_list_of_members(root: Path, tmp_path: Path) -> None:
    guide = (root / "server" / "README.md").read_text()
    example = guide.partition("```yaml\n   league: textiles\n")[2].partition("   ```")[0]
    text = "league: textiles\n" + "\n".join(line[3:] for line in example.splitlines())
    path = tmp_path / "members.yaml"
    path.write_text(text.replace("…", "0" * 60))
    assert set(load(MemberList, path).members) == {"alder", "birch", "cedar"}
