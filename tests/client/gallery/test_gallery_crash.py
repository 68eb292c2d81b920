"""kill -9 at any moment of adding and removing: the database, its files and the index agree, and nothing is half done.

Run as a program, this file makes the crashes: children are forked and killed, and the parent opens what they left. It
runs in a process of its own, so that a fork copies little.
"""

import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.crashes import dies_at, run

import hanse_client.gallery
from hanse_client.gallery import followed
from hanse_client.gallery import index as indexes
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product

EMBEDDING = bytes(32)
HERE = str(Path(hanse_client.gallery.__file__).parent)
FIRST = 24


def vector(number: int) -> np.ndarray:
    row = np.random.default_rng(number).standard_normal((1, 8))
    return (row / np.linalg.norm(row)).astype(np.float32)


def jpeg(number: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(256, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def put(gallery: Gallery, number: int) -> None:
    gallery.put(
        Product(sku=str(number), title=f"title {number}"), [jpeg(number)], {EMBEDDING: vector(number)}
    )


def made(folder: Path) -> None:
    """A gallery of `FIRST` products with a kept index."""
    with Gallery.open(folder) as gallery:
        for number in range(FIRST):
            put(gallery, number)
        gallery.search(EMBEDDING, vector(0), 1)
        gallery.settle()
    if not list(folder.glob("*.index")):
        raise RuntimeError("no index was kept")


def held(folder: Path) -> set[int]:
    """The products of what a crash left, after checking that everything agrees."""
    with Gallery.open(folder) as gallery:
        products = {int(product.sku) for product in gallery.products(limit=10_000)}
        found = gallery.search(EMBEDDING, vector(0), 1000)[0] if products else []
        if {int(match.product.sku) for match in found} != products:
            raise RuntimeError(f"the search finds {len(found)} products, {len(products)} are there")
        if (gallery.count_photos(), gallery.count_vectors(EMBEDDING)) != (len(products), len(products)):
            raise RuntimeError("photos or vectors without a product, or the other way round")
        for number in products:
            (digest,) = gallery.photos_of(str(number))
            if (
                gallery.photo(digest) != jpeg(number)
                or (gallery.vectors_of(str(number), EMBEDDING) != vector(number)).any()
            ):
                raise RuntimeError(f"product {number} is not what was put")
        gallery.settle()
        with gallery._store.read() as db:
            ids = [id_ for (id_,) in db.execute("SELECT id FROM prototype ORDER BY id")]
        if products and sorted(gallery._followed[EMBEDDING]._index.ids().tolist()) != ids:
            raise RuntimeError("the index in memory is not the database's")
    for path in folder.glob("*.index"):
        kept = indexes.VectorIndex.load(path, gallery._store.key(b"index" + EMBEDDING), 1 << 24)
        if sorted(kept.ids().tolist()) != ids:
            raise RuntimeError("the kept index is not the database's")
    # The journal that the crash left was emptied by the opening.
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    for number in range(FIRST):
        if number not in products and (
            vector(number).tobytes() in everything or jpeg(number)[-80:] in everything
        ):
            raise RuntimeError(f"product {number} is gone, but not from the files")
    return products


def at_lines(folder: Path, what: str, step: int) -> list[bool]:
    """Whether the product is there after a crash at each `step`-th line of putting, or of removing, one."""
    made(folder / "before")
    files = {path.name: path.read_bytes() for path in (folder / "before").iterdir()}
    found, point, crashed = [], 0, True
    while crashed:
        place = folder / str(point)
        place.mkdir()
        for name, data in files.items():
            (place / name).write_bytes(data)

        def action(place: Path = place) -> None:
            with Gallery.open(place) as gallery:
                if what == "put":
                    put(gallery, 1000)
                else:
                    gallery.remove("5")

        crashed = dies_at(point, action, HERE)
        products = held(place)
        if not set(range(FIRST)) - {5} <= products:
            raise RuntimeError("other products are gone")
        found.append((1000 if what == "put" else 5) in products)
        point += step
    return found


def at_any_time(folder: Path, kills: int) -> dict[str, int]:
    """Put, remove and search in children killed from outside; what was acknowledged must be there, or gone."""
    made(folder / "gallery")
    chance, there, next_number, acknowledged = random.Random(0), set(range(FIRST)), FIRST, 0
    for kill in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with Gallery.open(folder / "gallery") as gallery:
                own, mine, number = random.Random(kill), set(there), next_number
                while True:
                    removes = own.choice(sorted(mine)) if len(mine) > FIRST or own.random() < 0.4 else None
                    if removes is None:
                        put(gallery, number)
                        mine.add(number)
                        os.write(writing, b"+%d\n" % number)
                        number += 1
                    else:
                        gallery.remove(str(removes))
                        mine.remove(removes)
                        os.write(writing, b"-%d\n" % removes)
                    gallery.search(EMBEDDING, vector(number), 3)
        os.close(writing)
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading) as lines:
            for line in lines:
                acknowledged += 1
                number = int(line[1:])
                next_number = max(next_number, number + 1)
                (there.add if line[0] == "+" else there.remove)(number)
        products = held(folder / "gallery")
        if len(products ^ there) > 1 or not products - there <= {next_number}:
            raise RuntimeError(f"acknowledged {sorted(there)}, found {sorted(products)}")
        there, next_number = products, next_number + 1
    return {"acknowledged": acknowledged, "left": len(there)}


@pytest.mark.parametrize("step", [149, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["put", "remove"])
def test_a_product_is_wholly_there_or_not_at_all_wherever_the_crash(
    folder_in_memory: Path, what: str, step: int
) -> None:
    found = run(__file__, what, folder_in_memory, step)
    assert len(found) > 200 / step + 1
    assert found == sorted(found, reverse=what == "remove")  # before the commit nothing, after it everything
    assert set(found) == {False, True}


@pytest.mark.parametrize("kills", [3, pytest.param(150, marks=pytest.mark.slow)])
def test_what_was_acknowledged_is_done_whenever_the_kill(folder_in_memory: Path, kills: int) -> None:
    found = run(__file__, "any time", folder_in_memory, kills)
    assert found["acknowledged"] > 0


if __name__ == "__main__":
    indexes.EXACT_NUMBERS = 100
    followed.SAVE_SECONDS = 0.01
    what, place, number = sys.argv[1:]
    if what == "any time":
        print(json.dumps(at_any_time(Path(place), int(number))))
    else:
        print(json.dumps(at_lines(Path(place), what, int(number))))
