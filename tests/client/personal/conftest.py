"""What tests of what is the shop's own share: a shop with finer labels than the league's, and the command."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hanse_client import cli
from hanse_client.config import LeagueSettings

from .shelf import CLASSES, KINDS, OWN, league, picture


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shop whose folders are finer than the league's two classes, with 20 products of two photos in its gallery."""
    for number in range(120):
        path = tmp_path / "photos" / KINDS[number % 4] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number % 4, number).save(path)
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(OWN))
    league().save(tmp_path / "league")
    keys = {
        name: f"{number:02x}" * 32
        for number, name in enumerate(LeagueSettings.model_fields, 1)
        if name != "taxonomy"
    }
    fields = {
        "photos": "photos",
        "labels": "labels.yaml",
        "state": "state",
        "recognizer": "league",
        "holdout_fraction": 0.3,
        "device": "cpu",
        "league": keys | {"taxonomy": {"classes": list(CLASSES)}},
        "policy": {"league": "test", "epsilon": 3.0},
    }
    (tmp_path / "hanse-client.yaml").write_text(yaml.safe_dump(fields))
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "holdout.key").write_bytes(bytes(32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def personalize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hanse-client", "personalize", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run
