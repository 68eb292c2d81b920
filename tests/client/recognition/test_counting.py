"""What shoppers search for is counted where the owner allows it, by searches alone, and harms no answer."""

import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from hanse_client.config import ClientConfig
from hanse_client.gallery.product import Product
from hanse_client.queries import today
from hanse_client.recognition.engine import Engine
from hanse_client.recognition.service import Recognition

from .shop import picture

Following = Callable[..., Recognition]


def allowing(config: ClientConfig) -> ClientConfig:
    policy = config.policy.model_copy(update={"modes": (*config.policy.modes, "trends")})
    return config.model_copy(update={"policy": policy})


def kept(config: ClientConfig) -> dict[str, int]:
    with sqlite3.connect(config.state / "queries.sqlite") as db:
        rows = db.execute("SELECT day, class, count FROM query").fetchall()
    assert {day for day, _, _ in rows} <= {(today() - timedelta(days=n)).isoformat() for n in (0, 1)}
    return {label: count for _, label, count in rows}


def test_searches_by_photo_are_counted_by_class(
    config: ClientConfig, following_at_once: Following, caplog: pytest.LogCaptureFixture
) -> None:
    config = allowing(config)
    recognition = following_at_once(config)
    recognition.put(Product(sku="a", title="red"), [picture(1)])
    wanted: Counter[str] = Counter()
    for seed in range(6):
        wanted[recognition.classify(picture(seed)).classes[0].label] += 1
        recognition.search(picture(seed))
    # What the shop itself looks at, as at a till, and words, are no photos that a shopper searched by.
    recognition.recognize(picture(2))
    recognition.submit(picture(2)).result()
    recognition.embed(picture(2))
    recognition.similar("a")
    recognition.search(text="red")
    recognition.search_all([picture(3)])
    assert kept(config) == wanted
    (config.state / "queries.sqlite").write_bytes(b"damaged" * 1000)
    assert recognition.search(picture(1)).matches[0].product.sku == "a"
    assert "was not counted" in caplog.text


def test_without_leave_or_by_a_command_nothing_is_kept(
    config: ClientConfig, following_at_once: Following
) -> None:
    following_at_once(config).search(picture(1))
    with Recognition.open(allowing(config)) as command:
        command.search(picture(1))
    assert not (config.state / "queries.sqlite").exists()


@pytest.mark.parametrize("counted", [True, False])
def test_photos_that_are_counted_are_recognized_one_at_a_time(
    config: ClientConfig, following_at_once: Following, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    recognition = following_at_once(allowing(config) if counted else config)
    heights: list[int] = []
    original = Engine.see

    def see(self: Engine, photos: Any) -> Any:
        heights.append(len(photos))
        deadline = time.monotonic() + 10
        while sum(heights) + len(recognition._batcher._waiting) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        return original(self, photos)

    monkeypatch.setattr(Engine, "see", see)
    with ThreadPoolExecutor(6) as shoppers:
        asked = [shoppers.submit(recognition.search, picture(seed)) for seed in range(6)]
    for one in asked:
        one.result()
    # In a batch the last bits of a photo's scores depend on how many others there are.
    assert sum(heights) == 6 and (max(heights) == 1) is counted
