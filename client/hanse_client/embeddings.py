"""Each photo becomes an embedding once: computed with the recipe's public backbone, cached on the merchant's disk.

    with EmbeddingCache(folder / "embeddings.sqlite") as cache:
        embedded = embed(photos, recipe, cache)
    embedded.features, embedded.kept          # (m, …) float32, and which photos they belong to

An embedding is cached under the photo's content and the recipe's embedding digest, so a photo that is renamed
stays cached and one that changes does not, and a new head costs nothing. The cache holds only what can be
computed again: a damaged one is thrown away. Embeddings tell of photos, so nobody else may read the file.
"""

import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hanse_common.errors import CatalogError, PhotoError
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.centring import centred, load_centre
from hanse_common.vision.extraction import extract
from hanse_common.vision.recipe import Recipe

log = logging.getLogger(__name__)

CHUNK = 256
"""Photos embedded between two writes to the cache: what an interruption may lose."""

FLOAT = np.dtype("<f4")

Progress = Callable[[int, int], None]

_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""What SQLite reports of a file with other tables, with damaged pages, or of another kind."""

T = TypeVar("T")


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


class EmbeddingCache:
    """Embeddings in a SQLite file (mode 0600), made when missing, with its folder.

    A damaged file is made anew, whenever that is noticed. All methods raise `CatalogError` when the file can't
    be used at all: no permission, no space, another process that does not finish.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise CatalogError(
                f"{path}: cannot make the embedding cache ({error.strerror}); check the folder `state`."
            ) from None
        except sqlite3.DatabaseError as error:
            self._make_anew(error)

    def _open(self) -> None:
        self._path.touch()
        self._path.chmod(0o600)
        self._database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS embedding (recipe BLOB, content BLOB, vector BLOB NOT NULL, "
            "PRIMARY KEY (recipe, content)) WITHOUT ROWID"
        )

    def _make_anew(self, error: sqlite3.DatabaseError) -> None:
        """Replace a damaged file by an empty one. Raises `CatalogError` when `error` is no damage."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:
            raise CatalogError(
                f"{self._path}: cannot use the embedding cache ({error}); check the folder and the disk."
            ) from None
        log.warning("The embedding cache %s was damaged and is made anew.", self._path)
        self._database.close()
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._open()

    def _run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `action` returns, on a new file when this one is damaged."""
        try:
            return action(self._database)
        except sqlite3.DatabaseError as error:
            self._make_anew(error)
        return action(self._database)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

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
                database.executemany("INSERT OR REPLACE INTO embedding VALUES (?, ?, ?)", rows)

        self._run(write)

    def evict(self, recipe: bytes, contents: Iterable[bytes]) -> int:
        """Forget all but the embeddings of `contents` under `recipe`; return how many were forgotten."""
        rows = [(content,) for content in contents]

        def delete(database: sqlite3.Connection) -> int:
            database.execute("CREATE TEMP TABLE IF NOT EXISTS kept (content BLOB PRIMARY KEY)")
            database.execute("BEGIN IMMEDIATE")
            with database:
                database.execute("DELETE FROM kept")
                database.executemany("INSERT OR IGNORE INTO kept VALUES (?)", rows)
                return database.execute(
                    "DELETE FROM embedding WHERE recipe != ? OR content NOT IN (SELECT content FROM kept)",
                    (recipe,),
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
    progress: Progress = lambda done, total: None,
) -> Embedded:
    """Return the embeddings of `photos`: cached ones as they are, others computed and cached.

    A photo that can't be decoded any more is left out and named in `problems`. Without a backbone (a net trained
    whole) the "embedding" is the preprocessed image, which is not cached. `weights`, `whitening` and `centre` are
    local files, where the recipe names them; what is cached does not depend on the centre. `progress` hears (done,
    total) after each chunk.
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
        rows = extract(network, _open(photos, chunk, opened, problems), recipe.views, device)
        features[opened] = rows
        if network is not None:
            cache.put(name, zip((photos[index].digest for index in opened), rows, strict=True))
        done += len(chunk)
        progress(done, len(photos))
    kept = np.array([index for index in range(len(photos)) if index not in problems], dtype=np.intp)
    features = centred(features[kept] if problems else features, recipe, middle)
    return Embedded(features, kept, tuple(problems.values()))


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
