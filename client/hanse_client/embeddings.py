"""Each photo becomes an embedding once: computed with the recipe's public backbone, cached on the merchant's disk.

    with EmbeddingCache(folder / "embeddings.sqlite") as cache:
        embedded = embed(photos, recipe, cache)
    embedded.features, embedded.kept          # (m, …) float32, and which photos they belong to

An embedding is cached under the photo's content and the recipe's embedding digest, so a photo that is renamed
stays cached and one that changes does not, and a new head costs nothing. The cache holds only what can be
computed again: a damaged one is thrown away. Embeddings tell of photos, so nobody else may read the file.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hanse_client.photo_index import DisposableDatabase
from hanse_common.errors import PhotoError
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.centring import centred, load_centre
from hanse_common.vision.extraction import extract, network_rows
from hanse_common.vision.recipe import Recipe

CHUNK = 256
"""Photos embedded between two writes to the cache: what an interruption may lose."""

MAX_RECIPES = 3
"""Recipes whose embeddings are kept."""

_USED_NOW = "INTO recipe SELECT ?, 1 + coalesce(max(used), 0) FROM recipe"

FLOAT = np.dtype("<f4")

Progress = Callable[[int, int], None]


class Photo(Protocol):
    """What is embedded: something with a content digest that can be opened."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content, 32 bytes."""
        ...

    def open(self) -> Image.Image:
        """Return the decoded photo. Raises `PhotoError` when it can't be decoded any more."""
        ...


@dataclass(frozen=True)
class Embedded:
    """`features`, shape (m, …), float32: row i belongs to photo `kept[i]`; `problems` names the other photos."""

    features: NDArray[np.float32]
    kept: NDArray[np.intp]
    problems: tuple[str, ...]


class EmbeddingCache(DisposableDatabase):
    """Embeddings in the SQLite file `path`; see `DisposableDatabase`."""

    name = "embedding cache"
    schema = (
        """CREATE TABLE IF NOT EXISTS embedding
        (recipe BLOB, content BLOB, vector BLOB NOT NULL, PRIMARY KEY (recipe, content)) WITHOUT ROWID""",
        "CREATE TABLE IF NOT EXISTS recipe (name BLOB PRIMARY KEY, used INTEGER NOT NULL) WITHOUT ROWID",
    )

    def get(
        self, recipe: bytes, contents: Iterable[bytes], dimension: int
    ) -> dict[bytes, NDArray[np.float32]]:
        """Return the cached vectors, shape (dimension,), of `contents`, leaving out those not cached."""
        wanted = set(contents)

        def read(database: sqlite3.Connection) -> dict[bytes, NDArray[np.float32]]:
            found = {}
            for content in wanted:
                row = database.execute(
                    "SELECT vector FROM embedding WHERE recipe = ? AND content = ?", (recipe, content)
                ).fetchone()
                if row is not None and len(row[0]) == dimension * FLOAT.itemsize:
                    found[content] = np.frombuffer(row[0], dtype=FLOAT)
            return found

        return self._run(read)

    def put(self, recipe: bytes, vectors: Iterable[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Cache (content, vector) pairs, all or none."""
        rows = [(recipe, content, vector.astype(FLOAT).tobytes()) for content, vector in vectors]

        def write(database: sqlite3.Connection) -> None:
            database.execute("BEGIN IMMEDIATE")
            with database:
                database.execute(f"INSERT OR IGNORE {_USED_NOW}", (recipe,))
                database.executemany("INSERT OR REPLACE INTO embedding VALUES (?, ?, ?)", rows)

        self._run(write)

    def evict(self, recipe: bytes, contents: Iterable[bytes]) -> int:
        """Forget all photos but `contents`, and return how many embeddings were forgotten.

        `recipe` counts as used now; those of `MAX_RECIPES` stay, the most recently used, so that a league that changes
        between recipes makes nobody embed their photos again each time.
        """
        rows = [(content,) for content in contents]

        def delete(database: sqlite3.Connection) -> int:
            database.execute("CREATE TEMP TABLE IF NOT EXISTS kept (content BLOB PRIMARY KEY)")
            database.execute("BEGIN IMMEDIATE")
            with database:
                database.execute("DELETE FROM kept")
                database.executemany("INSERT OR IGNORE INTO kept VALUES (?)", rows)
                database.execute(f"INSERT OR REPLACE {_USED_NOW}", (recipe,))
                database.execute(
                    "DELETE FROM recipe WHERE name NOT IN (SELECT name FROM recipe ORDER BY used DESC LIMIT ?)",
                    (MAX_RECIPES,),
                )
                return database.execute(
                    "DELETE FROM embedding WHERE recipe NOT IN (SELECT name FROM recipe) "
                    "OR content NOT IN (SELECT content FROM kept)"
                ).rowcount

        return self._run(delete)


def embed(
    photos: Sequence[Photo],
    recipe: Recipe,
    cache: EmbeddingCache,
    *,
    device: str = "cpu",
    weights: Path | None = None,
    whitening: Path | None = None,
    centre: Path | None = None,
    memory: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Embedded:
    """Return the embeddings of `photos`: cached ones as they are, others computed and cached.

    A photo that can't be decoded any more is left out and named in `problems`. Without a backbone (a net trained
    whole) the "embedding" is the preprocessed image, which is not cached. `weights`, `whitening` and `centre` are
    local files, where the recipe names them; what is cached does not depend on the centre. `memory` bounds a batch, see
    `extract`. `progress` hears (done, total) after each chunk.
    """
    if recipe.backbone is None:
        cached: dict[bytes, NDArray[np.float32]] = {}
    else:
        name = recipe.embedding_digest()
        cached = cache.get(name, (photo.digest for photo in photos), recipe.feature_dimension)
    middle = load_centre(recipe, centre)
    todo = [index for index, photo in enumerate(photos) if photo.digest not in cached]
    network: torch.nn.Module | None = None
    if todo and recipe.backbone is not None:
        network = load_backbone(recipe, device=device, weights=weights, whitening=whitening)

    features = np.zeros((len(photos), *recipe.example_shape), dtype=np.float32)
    for index, photo in enumerate(photos):
        if photo.digest in cached:
            features[index] = cached[photo.digest]
    done = len(photos) - len(todo)
    progress(done, len(photos))
    problems: dict[int, str] = {}
    for first in range(0, len(todo), CHUNK):
        chunk = todo[first : first + CHUNK]
        opened: list[int] = []
        rows = extract(network, _open(photos, chunk, opened, problems), recipe.views, device, memory)
        features[opened] = rows
        if network is not None:
            cache.put(name, zip((photos[index].digest for index in opened), rows, strict=True))
        done += len(chunk)
        progress(done, len(photos))
    kept = np.array([index for index in range(len(photos)) if index not in problems], dtype=np.intp)
    features = centred(features[kept] if problems else features, recipe, middle)
    return Embedded(features, kept, tuple(problems.values()))


def embed_ahead(
    photos: Sequence[Photo],
    recipe: Recipe,
    cache: EmbeddingCache,
    stop: Callable[[], bool],
    *,
    device: str = "cpu",
    weights: Path | None = None,
    whitening: Path | None = None,
    memory: int | None = None,
    give_way: Callable[[Callable[[], bool]], None] = lambda stop: None,
    progress: Progress = lambda done, total: None,
) -> bool:
    """Embed and cache those of `photos` that are not cached yet, in idle time; return whether none was left out.

    What is cached is what `embed` would have made, to the bit. After each batch it asks `stop`, and ends when told so;
    before each it calls `give_way`, which waits while others want the machine (`resources.OtherWork.give_way`). A photo
    that can't be decoded is passed over. A recipe without a backbone has nothing to embed. Other arguments are as in
    `embed`.
    """
    if recipe.backbone is None:
        return True
    name = recipe.embedding_digest()
    cached = cache.get(name, (photo.digest for photo in photos), recipe.feature_dimension)
    todo = [photo for photo in photos if photo.digest not in cached]
    done = len(photos) - len(todo)
    progress(done, len(photos))
    if not todo:
        return True
    give_way(stop)
    if stop():
        return False
    network = load_backbone(recipe, device=device, weights=weights, whitening=whitening)
    step = network_rows(network, recipe.views, device, memory)
    for first in range(0, len(todo), step):
        give_way(stop)
        if stop():
            return False
        chunk = todo[first : first + step]
        opened: list[int] = []
        rows = extract(network, _open(chunk, range(len(chunk)), opened, {}), recipe.views, device, memory)
        cache.put(name, zip((chunk[index].digest for index in opened), rows, strict=True))
        done += len(chunk)
        progress(done, len(photos))
    return True


def _open(
    photos: Sequence[Photo], indices: Sequence[int], opened: list[int], problems: dict[int, str]
) -> Iterator[Image.Image]:
    """Yield the photos that can be decoded, noting their index in `opened`; note the others in `problems`."""
    for index in indices:
        try:
            image = photos[index].open()
        except PhotoError as error:
            problems[index] = str(error)
        else:
            opened.append(index)
            yield image
