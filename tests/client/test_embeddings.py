"""Embeddings: computed once, of this photo alone, and lost with nothing but a little time."""

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hanse_client import embeddings
from hanse_client.embeddings import CHUNK, EmbeddingCache, embed, embed_ahead
from hanse_common.errors import CatalogError, PhotoUnreadable
from hanse_common.vision.extraction import network_rows
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear, SmallCnn

RECIPE = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=6)),
)
NAME = RECIPE.embedding_digest()


@dataclass
class Picture:
    """A photo that counts how often it is opened."""

    number: int
    damaged: bool = False
    opened: int = field(default=0, compare=False)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(b"%d" % self.number).digest()

    def open(self) -> Image.Image:
        self.opened += 1
        if self.damaged:
            raise PhotoUnreadable(f"{self.number}.jpg: damaged")
        pixels = np.random.default_rng(self.number).integers(256, size=(12, 10), dtype=np.uint8)
        return Image.fromarray(pixels)


def pictures(count: int, first: int = 0) -> list[Picture]:
    return [Picture(number) for number in range(first, first + count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "embeddings.sqlite"


@pytest.fixture
def cache(path: Path) -> Iterator[EmbeddingCache]:
    with EmbeddingCache(path) as cache:
        yield cache


def opened(photos: list[Picture]) -> list[int]:
    return [photo.opened for photo in photos]


def test_each_photo_is_embedded_once(path: Path, cache: EmbeddingCache) -> None:
    photos = pictures(5)
    first = embed(photos, RECIPE, cache)
    assert first.features.shape == (5, 6) and first.features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(first.features, axis=1), 1, rtol=1e-5)
    assert first.kept.tolist() == [0, 1, 2, 3, 4] and first.problems == ()
    with EmbeddingCache(path) as again:
        second = embed(photos, RECIPE, again)
    assert opened(photos) == [1] * 5
    assert second.features.tobytes() == first.features.tobytes()


def test_the_backbone_is_loaded_only_when_needed(
    cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(pictures(3), RECIPE, cache)
    monkeypatch.setattr(embeddings, "load_backbone", None)
    assert len(embed(pictures(3), RECIPE, cache).features) == 3
    with pytest.raises(TypeError):
        embed(pictures(4), RECIPE, cache)


def test_a_changed_photo_is_embedded_again_and_a_renamed_one_is_not(cache: EmbeddingCache) -> None:
    old = pictures(3)
    features = embed(old, RECIPE, cache).features
    new = [Picture(2), Picture(7), Picture(0)]
    again = embed(new, RECIPE, cache).features
    assert opened(new) == [0, 1, 0]
    assert np.array_equal(again[[0, 2]], features[[2, 0]])
    assert not np.array_equal(again[1], features[1])


def test_another_backbone_does_not_take_this_ones_vectors(cache: EmbeddingCache) -> None:
    features = embed(pictures(3), RECIPE, cache).features
    seeded = RECIPE.model_copy(
        update={
            "backbone": Scattering(
                scales=1, angles=2, groups=None, projection=Projection(dimensions=6, seed=1)
            )
        }
    )
    other = pictures(3)
    assert not np.array_equal(embed(other, seeded, cache).features, features)
    assert opened(other) == [1] * 3


def test_another_head_costs_nothing(cache: EmbeddingCache) -> None:
    embed(pictures(3), RECIPE, cache)
    photos = pictures(3)
    embed(photos, RECIPE.model_copy(update={"model": Linear(dropout=0.5, l2=0.1)}), cache)
    assert opened(photos) == [0] * 3


def test_photos_that_are_gone_are_forgotten_under_every_recipe(cache: EmbeddingCache) -> None:
    photos = pictures(6)
    embed(photos, RECIPE, cache)
    cache.put(bytes(32), [(photo.digest, np.zeros(6, np.float32)) for photo in photos])
    kept = [photo.digest for photo in photos[:4]]
    assert cache.evict(NAME, [*kept, kept[0]]) == 4, "two photos that are gone, under two recipes"
    for name in (NAME, bytes(32)):
        assert cache.get(name, (photo.digest for photo in photos), 6).keys() == set(kept)
    assert cache.evict(NAME, kept) == 0


def test_the_recipes_used_last_are_kept(cache: EmbeddingCache) -> None:
    """A league that changes between recipes makes nobody embed anew."""
    photo = pictures(1)[0].digest
    names = [bytes([number]) * 32 for number in range(5)]

    def use(number: int) -> int:
        cache.put(names[number], [(photo, np.full(6, number, np.float32))])
        return cache.evict(names[number], [photo])

    def kept() -> set[int]:
        return {number for number, name in enumerate(names) if cache.get(name, [photo], 6)}

    assert [use(number) for number in (0, 1, 2, 0, 1, 2, 0)] == [0] * 7
    assert kept() == {0, 1, 2}
    assert use(3) == 1
    assert kept() == {0, 2, 3}, "1 was used least recently"
    cache.put(names[4], [(photo, np.zeros(6, np.float32))])
    assert kept() == {0, 2, 3, 4}, "embedded ahead, and used before the others are looked through again"
    assert use(3) == 1
    assert kept() == {0, 3, 4}


def test_a_cache_that_knows_no_recipes_yet_keeps_the_one_in_use(path: Path) -> None:
    with EmbeddingCache(path) as cache:
        embed(pictures(3), RECIPE, cache)
        cache.put(bytes(32), [(bytes(32), np.zeros(6, np.float32))])
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE recipe")
    database.close()
    photos = pictures(3)
    with EmbeddingCache(path) as cache:
        assert cache.evict(NAME, (photo.digest for photo in photos)) == 1
        embed(photos, RECIPE, cache)
    assert opened(photos) == [0] * 3


# In advance


def test_what_is_embedded_ahead_is_what_would_be_embedded_later(tmp_path: Path) -> None:
    photos = pictures(150)
    heard: list[tuple[int, int]] = []
    with EmbeddingCache(tmp_path / "ahead.sqlite") as cache:
        embed(photos[:7], RECIPE, cache)
        assert embed_ahead(photos, RECIPE, cache, lambda: False, progress=lambda *done: heard.append(done))
        assert opened(photos) == [1] * 150
        ahead = embed(photos, RECIPE, cache).features
        assert embed_ahead(photos, RECIPE, cache, lambda: False)
    assert opened(photos) == [1] * 150, "nothing is opened twice"
    assert heard == [(7, 150), (71, 150), (135, 150), (150, 150)]
    with EmbeddingCache(tmp_path / "later.sqlite") as cache:
        assert ahead.tobytes() == embed(photos, RECIPE, cache).features.tobytes()


def test_embedding_ahead_stops_within_a_batch_and_goes_on_there(cache: EmbeddingCache) -> None:
    photos = pictures(150)
    stop = False

    def progress(done: int, total: int) -> None:
        nonlocal stop
        stop = done > 0

    assert not embed_ahead(photos, RECIPE, cache, lambda: stop, progress=progress)
    assert sum(opened(photos)) == 64
    stop = False
    assert embed_ahead(photos, RECIPE, cache, lambda: stop)
    assert opened(photos) == [1] * 150
    assert not embed_ahead(pictures(1, first=500), RECIPE, cache, lambda: True)


def test_embedding_ahead_gives_way_before_every_batch(cache: EmbeddingCache) -> None:
    photos = pictures(150)
    done_at = []
    assert embed_ahead(
        photos, RECIPE, cache, lambda: False, give_way=lambda stop: done_at.append(sum(opened(photos)))
    )
    assert done_at == [0, 0, 64, 128], "first before the network is loaded"


def test_embedding_ahead_stops_while_it_waits(cache: EmbeddingCache) -> None:
    stop = False

    def waiting(asked: Callable[[], bool]) -> None:
        nonlocal stop
        stop = True
        assert asked()

    photos = pictures(3)
    assert not embed_ahead(photos, RECIPE, cache, lambda: stop, give_way=waiting)
    assert opened(photos) == [0] * 3


def test_embedding_ahead_passes_over_what_cannot_be_decoded(cache: EmbeddingCache) -> None:
    photos = pictures(5)
    photos[1].damaged = True
    assert embed_ahead(photos, RECIPE, cache, lambda: False)
    assert embed(photos, RECIPE, cache).kept.tolist() == [0, 2, 3, 4]
    assert opened(photos) == [1, 2, 1, 1, 1]


def test_a_net_trained_whole_has_nothing_to_embed_ahead(cache: EmbeddingCache) -> None:
    recipe = Recipe(preprocessing=Preprocessing(size=8, channels=3), backbone=None, model=SmallCnn())
    photos = pictures(3)
    assert embed_ahead(photos, recipe, cache, lambda: False)
    assert opened(photos) == [0] * 3


def test_embedding_keeps_to_its_memory(cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def rows(*arguments: Any) -> int:
        asked.append(arguments[3])
        return network_rows(*arguments)

    monkeypatch.setattr("hanse_common.vision.extraction.network_rows", rows)
    embed(pictures(3), RECIPE, cache, memory=1 << 20)
    embed_ahead(pictures(5), RECIPE, cache, lambda: False, memory=1 << 20)
    assert asked == [1 << 20] * 2


def test_an_embedding_depends_on_its_photo_alone(tmp_path: Path) -> None:
    """To the last bit: not on neighbours, on their number, or on its own place."""
    alone = []
    for number in range(3):
        with EmbeddingCache(tmp_path / f"{number}.sqlite") as cache:
            alone.append(embed([Picture(number)], RECIPE, cache).features[0])
    for others in (1, 2, 63, 64, 100, CHUNK - 2):
        photos = [*pictures(others, first=1000), *pictures(3)][::-1]
        with EmbeddingCache(tmp_path / f"with{others}.sqlite") as cache:
            together = embed(photos, RECIPE, cache).features
        assert together[:3][::-1].tobytes() == np.array(alone).tobytes(), others


def test_an_unreadable_photo_is_left_out_and_named(cache: EmbeddingCache) -> None:
    photos = pictures(5)
    photos[1].damaged = photos[4].damaged = True
    embedded = embed(photos, RECIPE, cache)
    assert embedded.kept.tolist() == [0, 2, 3]
    assert embedded.problems == ("1.jpg: damaged", "4.jpg: damaged")
    whole = embed([photos[0], photos[2], photos[3]], RECIPE, cache)
    assert np.array_equal(embedded.features, whole.features)
    assert opened(photos) == [1] * 5
    photos[1].damaged = False
    assert embed(photos, RECIPE, cache).kept.tolist() == [0, 1, 2, 3], "nothing was cached for it"


def test_a_whole_chunk_of_unreadable_photos(cache: EmbeddingCache) -> None:
    photos = [Picture(number, damaged=True) for number in range(3)]
    embedded = embed(photos, RECIPE, cache)
    assert embedded.features.shape == (0, 6) and len(embedded.problems) == 3
    assert embed([], RECIPE, cache).features.shape == (0, 6)


def test_an_interruption_loses_one_chunk_at_most(
    cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "CHUNK", 4)
    photos = pictures(11)
    heard = []

    def progress(done: int, total: int) -> None:
        heard.append((done, total))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(photos, RECIPE, cache, progress=progress)
    assert heard == [(0, 11), (4, 11), (8, 11)]
    heard.clear()
    embed(photos, RECIPE, cache, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(8, 11), (11, 11)]
    assert opened(photos) == [1] * 11


def test_without_a_backbone_the_picture_itself_is_the_example(path: Path, cache: EmbeddingCache) -> None:
    recipe = Recipe(preprocessing=Preprocessing(size=8, channels=3), backbone=None, model=SmallCnn())
    embedded = embed(pictures(3), recipe, cache)
    assert embedded.features.shape == (3, 3, 8, 8)
    assert embedded.features.std() > 0.1
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM embedding").fetchone() == (0,)


@pytest.mark.parametrize("length", [5, 7, 0])
def test_a_vector_of_another_length_is_computed_again(cache: EmbeddingCache, length: int) -> None:
    (photo,) = pictures(1)
    cache.put(NAME, [(photo.digest, np.zeros(length, np.float32))])
    assert embed([photo], RECIPE, cache).features.any()
    assert photo.opened == 1
    assert len(cache.get(NAME, [photo.digest], 6)) == 1


# The file


def test_nobody_else_may_read_the_file(path: Path) -> None:
    path.parent.mkdir()
    path.touch(mode=0o644)
    with EmbeddingCache(path) as cache:
        embed(pictures(2), RECIPE, cache)
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


@pytest.mark.parametrize("content", [b"", b"no database at all, but long enough to be one" * 99])
def test_a_file_that_is_no_cache_is_made_anew(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with EmbeddingCache(path) as cache:
        assert len(embed(pictures(2), RECIPE, cache).features) == 2


@pytest.mark.parametrize("schema", ["content BLOB, vector BLOB", "a INTEGER"])
def test_a_cache_of_another_release_is_made_anew(path: Path, schema: str) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute(f"CREATE TABLE embedding ({schema})")
    database.close()
    with EmbeddingCache(path) as cache:
        embed(pictures(2), RECIPE, cache)
        photos = pictures(2)
        embed(photos, RECIPE, cache)
        assert opened(photos) == [0, 0]


@pytest.mark.parametrize("begin", [100, 4096, 8192, 20_000])
def test_damage_anywhere_costs_time_only(path: Path, begin: int) -> None:
    """Pages of the file are overwritten while it is closed; whenever that is noticed, it is made anew."""
    photos = pictures(400)
    with EmbeddingCache(path) as cache:
        expected = embed(photos, RECIPE, cache).features
    data = bytearray(path.read_bytes())
    assert len(data) > 30_000
    data[begin : begin + 12_000] = b"\xa5" * 12_000
    path.write_bytes(data)
    with EmbeddingCache(path) as cache:
        assert np.array_equal(embed(photos, RECIPE, cache).features, expected)
        cache.evict(NAME, (photo.digest for photo in photos))
    assert max(opened(photos)) == 2
    with EmbeddingCache(path) as cache:
        embed(photos, RECIPE, cache)
    assert max(opened(photos)) == 2, "the file is sound again"


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CatalogError, match=r"embeddings\.sqlite: cannot make the embedding cache"):
        EmbeddingCache(tmp_path / "file" / "embeddings.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CatalogError, match="check the folder and the disk"):
        EmbeddingCache(tmp_path / "folder")


def test_a_full_disk(cache: EmbeddingCache) -> None:
    cache._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(CatalogError, match=r"full.*check the folder and the disk"):
        embed(pictures(300), RECIPE, cache)
