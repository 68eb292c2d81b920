"""A shelf of recognizers, and a shop that follows them without delay."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hanse_client.config import ClientConfig
from hanse_client.recognition import following
from hanse_client.recognition.service import Recognition

from .shop import Shelf, release, shop


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("recognizers"))


@pytest.fixture
def config(tmp_path: Path, shelf: Shelf) -> ClientConfig:
    """A shop with a first released recognizer."""
    config = shop(tmp_path)
    release(config, shelf.made[0, 0], 1)
    return config


@pytest.fixture
def recognition(config: ClientConfig) -> Iterator[Recognition]:
    """The core, which follows nothing."""
    with Recognition.open(config) as recognition:
        yield recognition


@pytest.fixture
def following_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Recognition]]:
    """Return a function that opens a core which looks for another recognizer all the time."""
    monkeypatch.setattr(following, "LOOK_SECONDS", 0.02)
    opened: list[Recognition] = []

    def open_(config: ClientConfig, **settings: Any) -> Recognition:
        opened.append(Recognition.open(config, follow=True, **settings))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()
