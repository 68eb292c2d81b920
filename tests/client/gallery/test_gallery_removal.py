"""Removal removes: no file of the folder has a byte of what was removed, whatever else is there and whoever reads."""

import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanse_client.gallery import followed
from hanse_client.gallery import index as indexes
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_client.gallery.store import PAGE_BYTES
from hanse_common.errors import GalleryError


def contents(folder: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def traces(number: int, jpeg, vectors) -> dict[str, bytes]:
    """Byte patterns of a product: its fields, its photo's picture and remark, its vector, and parts of these."""
    return {
        "title": b"title-%08d" % number,
        "category": b"category-%08d" % number,
        "attribute": b"attribute-%08d" % number,
        "photo": jpeg(number)[20:60],
        "end of photo": jpeg(number)[-60:],
        "vector": vectors[number].tobytes(),
        "part of a vector": vectors[number, 3:9].tobytes(),
    }


def kept(gallery, path: Path, embedding: bytes) -> indexes.VectorIndex:
    """The index in a file."""
    return indexes.VectorIndex.load(path, gallery._store.key(b"index" + embedding), 1 << 20)


def put(gallery, number: int, jpeg, vectors, embedding) -> None:
    product = Product(
        sku=f"sku-{number:08}",
        title=f"title-{number:08}" * 8,
        category=f"category-{number:08}",
        attributes={"name": f"attribute-{number:08}"},
    )
    gallery.put(product, [jpeg(number)], {embedding: vectors[number : number + 1]})


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_nothing_of_a_removed_product_is_in_any_file(
    folder, jpeg, unit, embedding, monkeypatch, seed: int
) -> None:
    """Over hundreds of products that come and go, so that pages split, merge and are used again."""
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", 60 * 16)
    monkeypatch.setattr(followed, "SAVE_SECONDS", 0.0)
    count, chance = 160, random.Random(seed)
    vectors, there, gone = unit(count, seed=seed), set(), set()
    with Gallery.open(folder) as gallery, Gallery.open(folder) as other:
        gallery._store._writer.execute("PRAGMA synchronous = OFF")
        for number in range(count):
            put(gallery, number, jpeg, vectors, embedding)
            there.add(number)
            if len(there) > 70 or chance.random() < 0.3:
                leaves = chance.choice(sorted(there))
                other.search(embedding, vectors[leaves : leaves + 1], 3)
                if number % 60 == 59:
                    other.settle()
                assert gallery.remove(f"sku-{leaves:08}")
                there.remove(leaves)
                gone.add(leaves)
                found = contents(folder)
                left = {name: data for name, data in traces(leaves, jpeg, vectors).items() if data in found}
                assert not left, [
                    (name, path.name)
                    for name in left
                    for path in folder.iterdir()
                    if left[name] in path.read_bytes()
                ]
                (matches,) = other.search(embedding, vectors[leaves : leaves + 1], 160)
                assert {match.product.sku for match in matches} == {
                    f"sku-{number:08}" for number in sorted(there)
                }
        other.settle()
        found = contents(folder)
        assert not [
            number for number in gone if any(data in found for data in traces(number, jpeg, vectors).values())
        ]
        assert all(data in found for number in there for data in traces(number, jpeg, vectors).values())
    found = contents(folder)
    assert not [
        number for number in gone if any(data in found for data in traces(number, jpeg, vectors).values())
    ]
    assert len(gone) > 80


def test_what_removal_must_remove_lies_in_no_page_of_a_table(gallery, folder, jpeg, unit, embedding) -> None:
    """Of rows that move between a table's pages copies may stay behind. SQLite says itself which pages are whose."""
    database = gallery._store._writer
    try:
        database.execute("SELECT 1 FROM dbstat").fetchone()
    except sqlite3.OperationalError:
        pytest.skip("this SQLite was built without dbstat")
    vectors, short = unit(12), unit(12, d=2)
    for number in range(12):
        product = Product(
            sku=f"sku-{number:08}",
            title=f"title-{number:08}" + "x" * 24 * number,  # words of less than a page, and of more
            category=f"category-{number:08}",
            attributes={"name": f"attribute-{number:08}"},
        )
        rows = slice(number, number + 1)
        gallery.put(product, [jpeg(number)], {embedding: vectors[rows], EMBEDDINGS[1]: short[rows]})
    gallery._store.scrub()
    data = (folder / "gallery.sqlite").read_bytes()
    pages: dict[bool, bytes] = {True: b"", False: b""}
    for number, kind in database.execute("SELECT pageno, pagetype FROM dbstat").fetchall():
        pages[kind == "overflow"] += data[PAGE_BYTES * (number - 1) : PAGE_BYTES * number]
    for number in range(12):
        hidden = traces(number, jpeg, vectors) | {"short vector": short[number].tobytes()}
        for name, trace in hidden.items():
            assert trace not in pages[False], (number, name)
    assert traces(3, jpeg, vectors)["vector"] in pages[True] and b"sku-00000003" in pages[False]


def test_nothing_of_a_removed_vector_is_in_the_kept_index_or_what_a_crash_left_of_one(
    folder, jpeg, unit, embedding, monkeypatch
) -> None:
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", 100)
    vectors = unit(40)
    with Gallery.open(folder) as gallery:
        for number in range(40):
            put(gallery, number, jpeg, vectors, embedding)
        gallery.search(embedding, vectors[:1], 1)
        gallery.settle()
        (path,) = folder.glob("*.index")
        (folder / f".{path.name}.x1y2").write_bytes(path.read_bytes())
        gallery.remove("sku-00000007")
        assert sorted(one.name for one in folder.iterdir() if "index" in one.name) == []
    (path,) = folder.glob("*.index")  # saved again when closed
    assert 8 not in kept(gallery, path, embedding).ids().tolist()


def test_one_who_only_removes_saves_the_index_again(folder, jpeg, unit, embedding, monkeypatch) -> None:
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", 100)
    vectors = unit(40)
    with Gallery.open(folder) as gallery:
        for number in range(40):
            put(gallery, number, jpeg, vectors, embedding)
        gallery.search(embedding, vectors[:1], 1)
        gallery.settle()
    with Gallery.open(folder) as gallery:
        gallery.remove("sku-00000003")
    (path,) = folder.glob("*.index")
    assert set(kept(gallery, path, embedding).ids().tolist()) == set(range(1, 41)) - {4}


def test_forgetting_an_embedding_leaves_nothing_of_it(folder, jpeg, unit, embedding, monkeypatch) -> None:
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", 100)
    vectors = unit(40)
    with Gallery.open(folder) as gallery:
        for number in range(40):
            put(gallery, number, jpeg, vectors, embedding)
        gallery.search(embedding, vectors[:1], 1)
        gallery.settle()
        assert vectors[5].tobytes() in contents(folder)
        gallery.forget(embedding)
        assert not any(vector.tobytes() in contents(folder) for vector in vectors)
        assert not list(folder.glob("*.index"))
        assert b"title-00000005" in contents(folder)


OTHER_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from hanse_client.gallery import index
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_common.errors import GalleryError
index.EXACT_NUMBERS = int(sys.argv[2])
queries = np.frombuffer(bytes.fromhex(sys.argv[4]), "<f4")[None]
with Gallery.open(Path(sys.argv[1])) as gallery:
    for line in sys.stdin:
        what, _, name = line.strip().partition(" ")
        if what == "search":
            print(*(match.product.sku for match in gallery.search(bytes.fromhex(sys.argv[3]), queries, 100)[0]))
            gallery.settle()
        elif what == "remove":
            print(gallery.remove(name))
        else:
            gallery.put(Product(sku=name), [bytes.fromhex(sys.argv[5])], {bytes.fromhex(sys.argv[3]): queries})
            print("put")
        sys.stdout.flush()
"""


@pytest.mark.parametrize("limit", [1 << 23, pytest.param(100, marks=pytest.mark.slow)])
def test_each_process_finds_what_the_other_put_and_not_what_it_removed(
    folder, jpeg, unit, embedding, monkeypatch, limit: int
) -> None:
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", limit)
    vectors = unit(40)
    with Gallery.open(folder) as gallery:
        for number in range(30):
            put(gallery, number, jpeg, vectors, embedding)
        arguments = [folder, limit, embedding.hex(), vectors[35].tobytes().hex(), jpeg(35).hex()]
        with subprocess.Popen(
            [sys.executable, "-c", OTHER_PROCESS, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:

            def ask(line: str) -> str:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                return process.stdout.readline().strip()

            def ours() -> set[str]:
                found = {match.product.sku for match in gallery.search(embedding, vectors[35:36], 100)[0]}
                gallery.settle()
                return found

            there = {f"sku-{number:08}" for number in range(30)}
            assert set(ask("search").split()) == ours() == there
            assert ask("put new") == "put"
            assert gallery.search(embedding, vectors[35:36], 1)[0][0].product.sku == "new"
            assert ask("remove sku-00000004") == "True"
            assert gallery.remove("sku-00000005")
            put(gallery, 31, jpeg, vectors, embedding)
            there = there - {"sku-00000004", "sku-00000005"} | {"new", "sku-00000031"}
            assert set(ask("search").split()) == ours() == there
            gallery.forget(embedding)
            assert ask("search") == ""
            assert ask("put again") == "put"
            assert ours() == {"new", "again"}  # they show one photo
            process.stdin.close()


# A plain dict, against which everything is held.

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.lists(st.integers(0, 7), max_size=3, unique=True)),
        st.tuples(st.just("remove"), st.integers(0, 5)),
        st.tuples(st.just("remove photo"), st.integers(0, 5), st.integers(0, 7)),
        st.tuples(st.just("vectors"), st.integers(0, 2)),
        st.tuples(st.just("forget"), st.integers(0, 1)),
        st.tuples(st.just("reopen")),
        st.tuples(st.just("search"), st.integers(0, 1), st.integers(0, 7), st.integers(1, 6)),
    ),
    max_size=30,
)
EMBEDDINGS = (bytes(32), bytes([1]) * 32)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, small=st.booleans(), first=st.integers(0, 1))
def test_whatever_is_done_the_gallery_is_what_a_plain_dict_is(
    tmp_path_factory, jpeg, unit, steps, small: bool, first: int
) -> None:
    """In two galleries on one folder by turns, with a small and a large index; vectors of every photo are known."""
    folder = tmp_path_factory.mktemp("gallery")
    known = {embedding: unit(8, seed=place) for place, embedding in enumerate(EMBEDDINGS)}
    shown: dict[int, list[int]] = {}  # the model: photos of each product, in order
    seen: dict[bytes, set[int]] = {embedding: set() for embedding in EMBEDDINGS}  # photos with a vector
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexes, "EXACT_NUMBERS", 32 if small else 1 << 23)
        galleries = [Gallery.open(folder), Gallery.open(folder)]
        for one in galleries:
            one._store._writer.execute("PRAGMA synchronous = OFF")
        digests = [indexes.hashlib.sha256(jpeg(number)).digest() for number in range(8)]

        def photos() -> set[int]:
            return {photo for views in shown.values() for photo in views}

        for turn, (what, *values) in enumerate(steps, first):
            gallery = galleries[turn % 2]
            if what == "put":
                sku, views = values
                embedding = EMBEDDINGS[sku % 2]
                gallery.put(
                    Product(sku=str(sku), title=f"{turn}"),
                    [jpeg(view) for view in views],
                    {embedding: known[embedding][views]} if views else None,
                )
                shown[sku] = list(dict.fromkeys([*shown.get(sku, []), *views]))
                seen[embedding] |= set(views)
            elif what == "remove":
                assert gallery.remove(str(values[0])) == (values[0] in shown)
                shown.pop(values[0], None)
            elif what == "remove photo":
                sku, view = values
                assert gallery.remove_photo(str(sku), digests[view]) == (view in shown.get(sku, []))
                shown[sku] = [one for one in shown.get(sku, []) if one != view] if sku in shown else []
                if not shown[sku] and gallery.get(str(sku)) is None:
                    del shown[sku]
            elif what == "vectors":
                embedding = EMBEDDINGS[values[0] % 2]
                missing = gallery.missing(embedding, 3)
                assert {digests.index(one) for one in missing} <= photos() - seen[embedding]
                assert bool(missing) == bool(photos() - seen[embedding])
                gallery.put_vectors(embedding, {one: known[embedding][digests.index(one)] for one in missing})
                seen[embedding] |= {digests.index(one) for one in missing}
            elif what == "forget":
                gallery.forget(EMBEDDINGS[values[0]])
                seen[EMBEDDINGS[values[0]]] = set()
            elif what == "reopen":
                gallery.close()
                galleries[turn % 2] = gallery = Gallery.open(folder)
            else:
                place, query, k = values
                embedding = EMBEDDINGS[place]
                (matches,) = gallery.search(embedding, known[embedding][query : query + 1], k)
                gallery.settle()
                wanted, looks = {}, {}
                for sku, views in shown.items():
                    if rows := [view for view in views if view in seen[embedding]]:
                        mean = known[embedding][rows].mean(axis=0, dtype=np.float64)
                        wanted[str(sku)] = float(mean @ known[embedding][query] / np.linalg.norm(mean))
                        looks[str(sku)] = 1.0 if query in rows else wanted[str(sku)]
                best = sorted(looks.values(), reverse=True)[:k]
                assert [match.score for match in matches] == pytest.approx(best, abs=1e-5)
                for match in matches:
                    assert match.similarity == pytest.approx(wanted[match.product.sku], abs=1e-5)
                    assert match.looks == pytest.approx(looks[match.product.sku], abs=1e-5)
            seen = {embedding: numbers & photos() for embedding, numbers in seen.items()}
            assert gallery.count() == len(shown)
            assert gallery.count_photos() == len(photos())
        for gallery in galleries:
            assert {product.sku for product in gallery.products()} == set(map(str, shown))
            for sku, views in shown.items():
                assert gallery.photos_of(str(sku)) == [digests[view] for view in views]
            gallery.close()


def test_what_cannot_be_deleted_stops_the_removal_and_says_so(folder, jpeg, unit, embedding) -> None:
    with Gallery.open(folder) as gallery:
        put(gallery, 1, jpeg, unit(2), embedding)
        (folder / f"{embedding.hex()}.index").mkdir()
        with pytest.raises(
            GalleryError, match=r"\.index: the kept index cannot be deleted .* so no product was removed"
        ):
            gallery.remove("sku-00000001")
        assert gallery.get("sku-00000001")
